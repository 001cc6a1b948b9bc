"""A recipe on many devices: memory of each, bytes between them, and the time of a step by an alpha-beta model.

With n devices in a ring, α seconds before a message arrives and β bytes a second of the slowest link on the way,

    all-gather of B bytes    (n-1)·α + (n-1)/n · B/β
    all-reduce of B bytes    the shorter of a ring, 2(n-1)·α + 2(n-1)/n · B/β, and a tree, 2⌈log₂ n⌉·α + 2B/β
    a step                   max(operations/rate, gathers of blocks but one) + the first block and what is outside the
                             blocks + all-reduce of gradients + control

The gathers of blocks hide behind products where the device does both at once (CUDA), the all-reduce does not: the loop
sums gradients after the last pass. `batch_size` rows are the most of one pass on one device, `batch_size` ×
`accumulation` those of a step on all of them, as in training. What it leaves out: other jobs on the network, waiting
for slow devices and for data, the loss of speed at small passes. Errors: `UserError`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from trimtab.core.errors import UserError
from trimtab.plan.devices import Device, device_of
from trimtab.plan.dry_run import prepared
from trimtab.plan.planning import Plan, new_modules_of, plan_of, read_outline, settled, task_of
from trimtab.plan.process import ROUNDING, Room, room
from trimtab.plan.traffic import Parts, Traffic, kept, parts_of, traffic, whole
from trimtab.train.recipe import Recipe, build_method, with_preset

LAYOUTS = {"none": "a copy on every device", "hybrid": "spread inside each machine", "full": "spread over all devices"}
MOST = 4096
"""Devices up to which tables of scaling go by default."""


@dataclass(frozen=True)
class Cluster:
    """Machines of `gpus` devices each."""

    device: Device
    gpus: int
    nodes: int

    @property
    def devices(self) -> int:
        return self.gpus * self.nodes

    def shards(self, layout: str) -> int:
        """Devices that one copy of the base is spread over."""
        return {"none": 1, "hybrid": self.gpus, "full": self.devices}[layout]

    def link(self, devices: int) -> tuple[float, float]:
        """α and β of a ring over so many devices: inside a machine if they are in one."""
        if devices <= self.gpus:
            return self.device.near_latency, self.device.near
        return self.device.far_latency, min(self.device.near, self.device.far)


@dataclass(frozen=True)
class Layout:
    """What a layout comes to on one device of a cluster. Bytes and seconds of one step."""

    shard: str
    devices: int
    step_rows: int
    rows: int
    """Rows of a step on the device with most of them."""
    passes: int
    memory_bytes: int
    fits: bool
    traffic: Traffic
    sent_bytes: float
    compute_seconds: float
    weights_seconds: float
    """All gathers of weights, hidden or not."""
    gradients_seconds: float
    step_seconds: float

    @property
    def rows_per_second(self) -> float:
        """Rows of all devices."""
        return self.step_rows / self.step_seconds

    def efficiency(self, alone: float) -> float:
        """Rows a second and device, as a share of 1/`alone`: those of a device that waits for nobody."""
        return self.rows_per_second / self.devices * alone


def gather_seconds(size: float, n: int, latency: float, bandwidth: float) -> float:
    """An all-gather by a ring."""
    return 0.0 if n == 1 else (n - 1) * latency + (n - 1) / n * size / bandwidth


def reduce_seconds(size: float, n: int, latency: float, bandwidth: float) -> float:
    """An all-reduce by a ring or a tree, whichever is shorter."""
    if n == 1:
        return 0.0
    ring = 2 * (n - 1) * latency + 2 * (n - 1) / n * size / bandwidth
    return min(ring, 2 * math.ceil(math.log2(n)) * latency + 2 * size / bandwidth)


@dataclass(frozen=True)
class Work:
    """A recipe's step: what the model consists of, its operations, and its memory in one process by rows of a pass."""

    parts: Parts
    flops_per_row: float
    fixed_bytes: float
    """Memory of a device that does not grow with the rows, without the frozen weights."""
    row_bytes: float
    slack: float
    """What the allocator makes of a byte that is asked for."""
    batch_size: int
    """Most rows of a pass."""

    def on(self, cluster: Cluster, layout: str, step_rows: int, limit: float) -> Layout:
        """One layout of a step of so many rows."""
        n, shards = cluster.devices, cluster.shards(layout)
        rows = -(-step_rows // n)
        passes = -(-rows // self.batch_size)
        sent = traffic(self.parts, shards, n, passes)
        varying = kept(self.parts, shards) + self.row_bytes * min(rows, self.batch_size)
        memory = self.fixed_bytes + self.slack * varying
        compute = rows * self.flops_per_row / cluster.device.flops
        alpha, beta = cluster.link(shards)
        each = [gather_seconds(whole(group, shards), shards, alpha, beta) for group in self.parts.blocks if group]
        outside = gather_seconds(whole(self.parts.rest, shards), shards, alpha, beta) if self.parts.rest else 0.0
        blocks, first = 2 * passes * sum(each), passes * (each[0] if each else 0.0)
        alpha, beta = cluster.link(n)
        summed = sent.reductions and reduce_seconds(sent.reduced, n, sent.reductions * alpha, beta)
        control = sent.control * reduce_seconds(64, n, alpha, beta)
        hidden = max(compute, blocks - first) if cluster.device.overlaps else compute + blocks - first
        step = hidden + first + passes * outside + summed + control
        return Layout(
            shard=layout,
            devices=n,
            step_rows=step_rows,
            rows=rows,
            passes=passes,
            memory_bytes=round(memory),
            fits=memory <= limit,
            traffic=sent,
            sent_bytes=sent.per_device(shards, n),
            compute_seconds=compute,
            weights_seconds=blocks + passes * outside,
            gradients_seconds=summed + control,
            step_seconds=step,
        )


@dataclass(frozen=True)
class Scaling:
    """A recipe on a cluster: every layout, the one advised, and how it goes on with more devices."""

    model: str
    device: Device
    gpus: int
    nodes: int
    room: str
    room_bytes: int
    length: int
    step_rows: int
    plan: Plan
    """Of one device alone, with the rows it gets."""
    layouts: tuple[Layout, ...]
    advised: str | None
    why: str
    weak: tuple[Layout, ...]
    strong: tuple[Layout, ...]
    seconds: float

    def document(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @property
    def alone(self) -> float:
        """Seconds of products that a row takes on one device."""
        return self.plan.flops_per_step / int(self.plan.recipe["batch_size"]) / self.device.flops


def plan_many(
    recipe: Recipe,
    *,
    gpus: int,
    nodes: int = 1,
    fit: str | None = None,
    flops: float | None = None,
    node_bandwidth: str | None = None,
    link_bandwidth: str | None = None,
    link_latency: float | None = None,
    completions: float = 1.0,
) -> Scaling:
    """`trimtab plan --gpus N --nodes M` from Python: a recipe on `nodes` machines of `gpus` devices each.

    `fit` names the device (h100); bandwidths are sizes a second (25GB), `link_latency` is in seconds, `flops` in
    operations a second that are reached. Errors: `UserError`.
    """
    where = room(fit)
    links = {"node_bandwidth": node_bandwidth, "link_bandwidth": link_bandwidth}
    device = device_of(where, flops=flops, link_latency=link_latency, **links)
    return scaling_of(recipe, where, device, gpus, nodes, completions=completions)


def scaling_of(
    recipe: Recipe, room: Room, device: Device, gpus: int, nodes: int, *, completions: float = 1.0, most: int = MOST
) -> Scaling:
    """Plan a recipe for `nodes` machines of `gpus` devices each."""
    started = time.perf_counter()
    if gpus < 1 or nodes < 1:
        raise UserError(f"plan: {gpus} × {nodes} are no devices", fix="--gpus 8 --nodes 4")
    recipe = settled(with_preset(recipe, build_method(recipe)), room)
    step_rows = recipe.batch_size * recipe.accumulation
    cluster = Cluster(device, gpus, nodes)
    rows = min(recipe.batch_size, -(-step_rows // cluster.devices))
    plan, work = work_of(recipe, room, rows, completions)
    asked = None if recipe.shard == "none" else recipe.shard
    layouts = [work.on(cluster, name, step_rows, room.bytes) for name in possible(cluster)]
    advised, why = advice(layouts, asked)
    chosen = advised or layouts[-1].shard
    return Scaling(
        model=recipe.model,
        device=device,
        gpus=gpus,
        nodes=nodes,
        room=room.name,
        room_bytes=round(room.bytes),
        length=recipe.max_length or 512,
        step_rows=step_rows,
        plan=plan,
        layouts=tuple(layouts),
        advised=advised,
        why=why,
        weak=tuple(grown(work, cluster, chosen, room.bytes, most, per_device=layouts[0].rows)),
        strong=tuple(grown(work, cluster, chosen, room.bytes, min(most, step_rows), step_rows=step_rows)),
        seconds=round(time.perf_counter() - started, 3),
    )


def work_of(recipe: Recipe, room: Room, rows: int, completions: float) -> tuple[Plan, Work]:
    """The plan of one device with so many rows a pass, and what it says of any other number of them."""
    plan = plan_of(replace(recipe, batch_size=rows, shard="none"), fit=room, completions=completions)
    model = read_outline(recipe)
    task = task_of(model, recipe)
    bench = prepared(recipe, model, task, new_modules_of(model, task), recipe.max_length or 512)
    parts = parts_of(bench.model)
    growing = sum(plan.memory[name] for name in ("activations", "logits", "temporary"))
    slack = 1 + ROUNDING if room.kind == "cuda" else 1.0
    passing = max(0, plan.memory.get("file", 0)) + plan.memory.get("loading", 0)
    fixed = plan.peak_memory_bytes - passing - slack * (growing + parts.frozen)
    return plan, Work(parts, plan.flops_per_step / rows, fixed, growing / rows, slack, recipe.batch_size)


def possible(cluster: Cluster) -> list[str]:
    """The layouts that are not the same on this cluster."""
    if cluster.devices == 1:
        return ["none"]
    return ["none", "full"] if cluster.nodes == 1 or cluster.gpus == 1 else ["none", "hybrid", "full"]


def advice(layouts: Sequence[Layout], asked: str | None) -> tuple[str | None, str]:
    """The layout to take, and why."""
    fitting = [one for one in layouts if one.fits]
    if not fitting:
        least = min(layouts, key=lambda one: one.memory_bytes)
        return None, (
            f"nothing fits: even {least.shard} needs {least.memory_bytes / 1e9:.1f} GB a device; try quantize: nf4, "
            "checkpointing: block, a smaller batch_size with accumulation, or more devices"
        )
    best = min(fitting, key=lambda one: one.step_seconds)
    simplest = next(one for one in fitting if one.step_seconds <= 1.02 * best.step_seconds)
    by_name = {one.shard: one for one in layouts}
    if asked in by_name and by_name[asked].fits and asked != simplest.shard:
        told = f"the recipe says {asked}; {simplest.shard} would take {simplest.step_seconds:.3g} s a step"
        return asked, told
    lost = [one.shard for one in layouts if not one.fits]
    reason = f"{' and '.join(lost)} would not fit; " if lost else ""
    slower = [(one.shard, one.step_seconds / simplest.step_seconds) for one in fitting if one is not simplest]
    reason += ", ".join(f"{name} would take {times:.2f} times as long" for name, times in slower)
    return simplest.shard, reason.removesuffix("; ") or "there is one device"


def grown(
    work: Work, cluster: Cluster, layout: str, room: float, most: int, *, per_device: int = 0, step_rows: int = 0
) -> list[Layout]:
    """The layout on 1, 2, 4, ... devices, with so many rows on each or so many in all."""
    found, devices = [], 1
    while devices <= most:
        gpus = min(devices, cluster.gpus)
        here = replace(cluster, gpus=gpus, nodes=-(-devices // gpus))
        found.append(work.on(here, layout, step_rows or per_device * here.devices, room))
        devices *= 2
    return found
