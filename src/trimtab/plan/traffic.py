"""Which bytes the processes of a run send each other in a step, by closed formulas.

    gradients   an all-reduce of what trains, once a step, in messages of at most `BUCKET` entries
    weights     with `shard`, an all-gather of every block in forward and again in backward, and of the rest (embedding,
                last norm, output) once, in every pass; frozen weights have no gradients, so nothing is scattered
    control     three all-reduces of a few float64 numbers: trained terms, the loss with flags, interrupts

A gathered tensor counts as its shards: along its first axis, each of ⌈rows/n⌉, the last one filled up. Codes of
quantized weights travel as they are stored. `tests/train/test_traffic.py` counts the same in real processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trimtab.engine.checkpointing import stacks_of
from trimtab.engine.ranks import buckets

CONTROL = 3
"""All-reduces of numbers that a step needs to agree on."""


@dataclass(frozen=True)
class Stored:
    """A frozen tensor: its first axis, and the bytes of one entry of it."""

    rows: int
    row_bytes: int

    @classmethod
    def of(cls, tensor: Tensor) -> Stored:
        rows = tensor.shape[0]
        return cls(rows, tensor.numel() // max(rows, 1) * tensor.element_size())

    def share(self, n: int) -> int:
        """Bytes of the part that each of n devices keeps."""
        return -(-self.rows // n) * self.row_bytes


@dataclass(frozen=True)
class Parts:
    """What a model consists of, for those who spread it: frozen tensors by block, the rest, and what trains."""

    blocks: tuple[tuple[Stored, ...], ...]
    rest: tuple[Stored, ...]
    gradients: int
    """Bytes of the gradients of what trains."""
    messages: int
    """All-reduces they are sent in."""

    @property
    def frozen(self) -> int:
        """Bytes of all frozen tensors, in one piece each."""
        return sum(one.share(1) for group in (*self.blocks, self.rest) for one in group)


def parts_of(model: nn.Module) -> Parts:
    """The parts of a model that is quantized and attached; on the meta device it costs nothing."""
    from trimtab.engine.shards import kept_whole

    own = {id(one) for one in kept_whole(model)}
    inside: set[int] = set()
    blocks = []
    for stack in stacks_of(model):
        for block in stack:
            frozen = [one for one in block.parameters() if id(one) not in own]
            inside |= {id(one) for one in frozen}
            blocks.append(tuple(map(Stored.of, frozen)))
    rest = tuple(Stored.of(one) for one in model.parameters() if id(one) not in own | inside)
    trained: list[Any] = [one for one in model.parameters() if one.requires_grad]
    size = sum(one.numel() * one.element_size() for one in trained)
    return Parts(tuple(blocks), rest, size, sum(1 for _ in buckets(trained)))


@dataclass(frozen=True)
class Traffic:
    """Payloads of one step: calls and bytes of whole tensors, whatever part of them each device sends."""

    gathers: int
    gathered: int
    reductions: int
    reduced: int
    control: int = CONTROL

    def per_device(self, shards: int, devices: int) -> float:
        """Bytes that one device sends by rings: (n-1)/n of what is gathered, twice that of what is summed."""
        return (shards - 1) / shards * self.gathered + 2 * (devices - 1) / devices * self.reduced


def traffic(parts: Parts, shards: int, devices: int, passes: int = 1) -> Traffic:
    """The traffic of one step on `devices`, over `shards` of which each copy of the base is spread (1: not at all)."""
    reductions, reduced = (parts.messages, parts.gradients) if devices > 1 else (0, 0)
    control = CONTROL if devices > 1 else 0
    if shards == 1:
        return Traffic(0, 0, reductions, reduced, control)
    groups = [group for group in parts.blocks if group]
    twice = sum(whole(group, shards) for group in groups)
    once = whole(parts.rest, shards)
    calls = 2 * len(groups) + bool(parts.rest)
    return Traffic(passes * calls, passes * (2 * twice + once), reductions, reduced, control)


def whole(group: Iterable[Stored], shards: int) -> int:
    """Bytes that come out of an all-gather."""
    return sum(shards * one.share(shards) for one in group)


def kept(parts: Parts, shards: int, ahead: int = 1) -> int:
    """Bytes of frozen weights on one device at the fullest moment: its shards, what is gathered for a pass outside the
    blocks, and the largest block with `ahead` more that are on their way."""
    if shards == 1:
        return parts.frozen
    own = sum(one.share(shards) for group in (*parts.blocks, parts.rest) for one in group)
    largest: Sequence[int] = sorted((whole(group, shards) for group in parts.blocks), reverse=True)
    return own + whole(parts.rest, shards) + sum(largest[: 1 + ahead])
