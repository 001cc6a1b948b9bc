"""What devices and links can do: rates from data sheets, the share of them that is assumed to be reached, this machine.

Figures are the makers' for dense products in 16 bits and for one direction of a link; none of them was measured here.
Every one can be replaced: `--device-flops`, `--node-bandwidth`, `--link-bandwidth`, `--link-latency`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from trimtab.core.errors import UserError, nearest
from trimtab.plan.process import Room, size_of

ACHIEVED = 0.4
"""Share of a data sheet's rate that a step's products reach: assumed, as for large models in large batches."""
NEAR, FAR = 6e-6, 15e-6
"""Seconds before the first byte of a message arrives, inside a machine and between machines: assumed."""
LOOPBACK, LOOPBACK_LATENCY = 1e9, 100e-6
"""Bytes and seconds of gloo between processes of one CPU: assumed."""


@dataclass(frozen=True)
class Device:
    """One device and its links. Rates in operations and bytes a second, latencies in seconds."""

    name: str
    flops: float
    """Operations a second that are reached, not the peak."""
    near: float
    """Bytes a second of one device to the others of its machine."""
    far: float
    """Bytes a second of one device to other machines: its part of the machine's network."""
    near_latency: float = NEAR
    far_latency: float = FAR
    overlaps: bool = True
    """Whether gathering weights goes on while products run."""
    source: str = "data sheets, of which 40 % is assumed to be reached"


SHEETS: dict[str, tuple[float, float, float]] = {
    "t4": (65e12, 16e9, 1.5e9),
    "v100": (125e12, 150e9, 12.5e9),
    "rtx3090": (71e12, 32e9, 1.5e9),
    "rtx4090": (165e12, 32e9, 1.5e9),
    "rtx5090": (209e12, 64e9, 1.5e9),
    "l4": (121e12, 32e9, 1.5e9),
    "a10g": (70e12, 32e9, 3e9),
    "a6000": (155e12, 32e9, 3e9),
    "l40s": (362e12, 32e9, 6e9),
    "a100-40": (312e12, 300e9, 25e9),
    "a100": (312e12, 300e9, 25e9),
    "a100-80": (312e12, 300e9, 25e9),
    "h100": (989e12, 450e9, 50e9),
    "h200": (989e12, 450e9, 50e9),
    "mi300x": (1307e12, 448e9, 50e9),
    "b200": (2250e12, 900e9, 50e9),
}
"""Peak of dense products in 16 bits (operations/s), link inside a machine and network per device (bytes/s): NVLink or
Infinity Fabric where the device is sold with it, else PCIe; 400 or 200 Gb/s InfiniBand per device beside NVLink, else
the usual Ethernet of its machines, shared by eight."""


def device_of(
    room: Room,
    *,
    flops: float | None = None,
    node_bandwidth: str | None = None,
    link_bandwidth: str | None = None,
    link_latency: float | None = None,
) -> Device:
    """The device of a plan, with what was given in place of the table.

    `flops` is the rate that is reached. A device that is not in the table needs it, and `node_bandwidth`; the CPU of
    this machine is timed (a quarter of a second).
    """
    if room.kind == "cpu":
        rate = flops or measured()
        own = Device(room.name, rate, LOOPBACK, LOOPBACK, LOOPBACK_LATENCY, LOOPBACK_LATENCY, False, "timed here")
    elif room.name in SHEETS:
        peak, near, far = SHEETS[room.name]
        own = Device(room.name, ACHIEVED * peak, near, far)
    elif flops and node_bandwidth:
        own = Device(room.name, flops, 0.0, 1.5e9, source="given")
    else:
        known = nearest(room.name.lower(), SHEETS)
        raise UserError(
            f"plan: no rates are known of {room.name}, and --gpus needs those of a device and of its links",
            fix=f"--fit {known[0] if known else 'h100'}, or --device-flops 4e14 --node-bandwidth 300GB",
        )
    found = replace(own, flops=flops or own.flops)
    if node_bandwidth:
        found = replace(found, near=size_of(node_bandwidth), far=min(found.far, size_of(node_bandwidth)))
    if link_bandwidth:
        found = replace(found, far=size_of(link_bandwidth))
    if link_latency is not None:
        found = replace(found, far_latency=link_latency, near_latency=min(found.near_latency, link_latency))
    changed = flops or node_bandwidth or link_bandwidth or link_latency is not None
    return replace(found, source=f"{own.source}; changed by what was given" if changed else own.source)


def measured(seconds: float = 0.25) -> float:
    """Operations a second of fp32 products on this machine's CPU, the best of several."""
    import torch

    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    a @ b
    best, until = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        a @ b
        best = max(best, 2 * 1024**3 / (time.perf_counter() - began))
    return best
