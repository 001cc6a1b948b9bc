"""What a process holds beside the step's own tensors, in constants that were measured, and what machines have.

The constants are for a Linux CPU with glibc and torch 2.13, fp32, one thread (`benchmarks/memory/table.py` measures
them anew). On CUDA the context, its libraries and the allocator's rounding take their place; none of it was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trimtab.core.errors import UserError, nearest
from trimtab.core.machine import host_memory

BASE = 350e6
"""Bytes of Python, torch, transformers, the data and plotting libraries before a weight is read."""
TOKEN = 2.4e3
"""Bytes of a tokenizer per token of its vocabulary."""
HOLES, HALF = 0.6, 900e6
"""Of what comes and goes in a step, x bytes, glibc cannot use HOLES·x²/(x + HALF) again at the highest point: heaps
of small steps have few holes, those of large ones many. Fitted to SmolLM2 with LoRA from 64 to 2,048 tokens. Where
activations are computed again, or layers take turns in training, less is held at once but as much passes: x is that."""
LEFT = 0.5
"""Share of these holes that is left where blocks run again: small gradients lie side by side there, and freed memory
goes back around large blocks. SmolLM2 and MiniLM with LoRA, 512 and 1,024 tokens a step, had 0.08 to 1.2 of them."""
MOST = 1e9
"""The most of it: larger steps are made of tensors that are mapped one by one. Assumed; 0.7e9 is the most seen."""
CODED = 120e6
"""Bytes of holes that decoding quantized weights leaves: one measurement, SmolLM2 in NF4."""
CONTEXT = 0.6e9
"""Bytes of a CUDA context with its libraries: what is commonly reported, not measured here."""
ROUNDING = 0.06
"""Share that CUDA's allocator rounds up and splits off: assumed, not measured here."""

DEVICES = {
    "rtx3060": 12e9,
    "t4": 16e9,
    "v100": 32e9,
    "rtx3090": 24e9,
    "rtx4090": 24e9,
    "l4": 24e9,
    "a10g": 24e9,
    "rtx5090": 32e9,
    "a100-40": 40e9,
    "l40s": 48e9,
    "a6000": 48e9,
    "a100": 80e9,
    "a100-80": 80e9,
    "h100": 80e9,
    "h200": 141e9,
    "mi300x": 192e9,
    "b200": 192e9,
}
"""Nominal memory of devices, in bytes of 10^9, by name."""

UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Room:
    """Memory that a plan has to fit into."""

    name: str
    bytes: float
    kind: str
    """cpu or cuda: what is added to a step's own bytes."""


PASSING = ("gradients", "activations", "logits", "temporary")
"""Categories of what comes and goes in a step."""


def passing(live: Mapping[str, int]) -> int:
    """Bytes of what comes and goes in a step, at its highest point."""
    return sum(live[name] for name in PASSING)


def around(
    live: dict[str, int], kind: str, vocabulary: int, mapped: float, coded: bool, through: int = 0, again: bool = False
) -> dict[str, float]:
    """Bytes beside living tensors: of the process itself, and of allocator and kernels.

    `through` is what would come and go without checkpointing and with all layers in training, where that is more;
    `again` says that blocks run again.

    `mapped` is what of a mapped file of weights is not in memory (negative): rows of an embedding that no token reads,
    and weights that a method replaces.
    """
    if kind == "cuda":
        return {"process": CONTEXT, "allocator": ROUNDING * sum(live.values())}
    x = max(passing(live), through)
    holes = min(HOLES * x**2 / (x + HALF), MOST) * (LEFT if again else 1)
    return {"process": BASE + TOKEN * vocabulary, "allocator": holes + CODED * coded, "file": mapped}


def room(name: str | None) -> Room:
    """This machine, a named device, or a size such as 24GB (10^9 bytes; GiB are 2^30), meant as that of a GPU."""
    if not name:
        return this_machine()
    plain = name.lower().replace(" ", "").replace("_", "")
    if plain in DEVICES:
        return Room(plain, DEVICES[plain], "cuda")
    return Room(name, size_of(name), "cuda")


def size_of(text: str) -> float:
    """Bytes of `24GB`, `16 GiB`, `500MB`."""
    plain = text.strip().upper().replace(" ", "")
    digits = plain.rstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    unit = plain[len(digits) :]
    unit = f"{unit}B" if unit in ("K", "M", "G", "T", "KI", "MI", "GI") else unit
    try:
        found = float(digits) * UNITS[unit]
    except (KeyError, ValueError):
        close = nearest(text.lower(), DEVICES)
        fix = f"did you mean {close[0]}?" if close else "a size like 24GB, or a device like rtx4090"
        raise UserError(f"fit: {text!r} is no size and no known device", fix=fix) from None
    if found <= 0:
        raise UserError(f"fit: {text!r} is no memory at all", fix="a size like 24GB")
    return found


def this_machine() -> Room:
    """The GPU that a run would take, else the memory of this machine, or of its container where that has less."""
    import torch

    if torch.cuda.is_available():
        return Room(torch.cuda.get_device_name(), float(torch.cuda.get_device_properties(0).total_memory), "cuda")
    return Room("this machine", host_memory(), "cpu")
