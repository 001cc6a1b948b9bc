"""Everything a run has decided before its first step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trimtab.core.fisher import MEASURES
from trimtab.core.state import Part
from trimtab.data.batches import collate
from trimtab.data.encoded import Encoded, EncodedSet
from trimtab.data.packing import SHARE, bag, pack
from trimtab.data.shares import shares
from trimtab.engine.attention import edited_ends
from trimtab.engine.encoder import Seam
from trimtab.engine.faster import running
from trimtab.engine.heap import heap_kept
from trimtab.engine.loss import Batch, ends_with_head, loss_sum, on
from trimtab.engine.ranks import ALONE, Ranks
from trimtab.evaluate.loss import evaluate
from trimtab.train.recipe import Recipe
from trimtab.train.updates import Ratios

if TYPE_CHECKING:
    from trimtab.models.slices import Slices

MEASURED_ROWS = 256


@dataclass
class Job:
    """Everything a run has decided before its first step."""

    recipe: Recipe
    directory: Path
    model: Any
    device: torch.device
    task: str
    train_rows: EncodedSet
    heldout_rows: EncodedSet
    pad_id: int
    packing: str
    group: int | None
    seam: Seam | None
    pieces: tuple[str, ...]
    rate: float
    ratios: Ratios
    steps: int
    steps_per_epoch: int
    record: dict[str, Any]
    tokenizer: Any = None
    ranks: Ranks = ALONE
    slices: Slices | None = None
    codes: Path | None = None
    """The file of a base whose codes were chosen by data."""

    @property
    def sharded(self) -> bool:
        """Whether the frozen weights are spread over the processes, which then all run as many passes."""
        return self.recipe.shard != "none"

    def passes(self, rows: Sequence[int]) -> list[tuple[Batch, int]]:
        """The batches that this process runs in a step over these rows, each with 1; with 0 one that does not count."""
        size, every = self.recipe.batch_size, [list(rows)]
        if self.ranks.size > 1:
            own = shares([self.train_rows[row] for row in rows], self.ranks.size, common=self.packing == "shared")
            every = [[rows[at] for at in one] for one in own]
        mine = every[self.ranks.rank]
        found = [(self.batch(mine[at : at + size]), 1) for at in range(0, len(mine), size)]
        if self.sharded:
            most = max(math.ceil(len(one) / size) for one in every)
            found += [(self.batch(rows[:1]), 0)] * (most - len(found))
        return found

    def batch(self, indices: Sequence[int]) -> Batch:
        """Some training rows as one batch, on the model's device."""
        return on(self.together([self.train_rows[index] for index in indices]), self.device)

    def together(self, rows: Sequence[Encoded]) -> Batch:
        """Rows as one sequence, or padded."""
        if self.packing == "off":
            return collate(rows, self.pad_id)
        if self.seam is not None:
            return bag(rows, self.seam.first_position)
        return pack(rows, SHARE if self.packing == "shared" else None, edited_ends(self.model) or ())

    @contextmanager
    def running(self) -> Iterator[None]:
        """What the model is trained and measured in."""
        packed, policy, compile = self.packing != "off", self.recipe.checkpointing, self.recipe.compile
        heap = heap_kept() if self.device.type == "cpu" and self.recipe.shard == "none" else nullcontext()
        how: dict[str, Any] = {"pieces": self.pieces, "policy": policy, "group": self.group, "compile": compile}
        parts = running(self.model, packed=packed, seam=self.seam, **how)
        with heap, parts:
            yield

    def measure_again(self, part: Part, step: int) -> dict[str, torch.Tensor]:
        """The statistics of a part on some training rows, other ones after every step."""
        generator = torch.Generator().manual_seed(self.recipe.seed + step)
        chosen = torch.randperm(len(self.train_rows), generator=generator)[:MEASURED_ROWS].tolist()
        rows = [on(self.together([self.train_rows[index]]), self.device) for index in chosen]
        return statistics_of(self.model, part, rows, self.task)

    def measure(self) -> dict[str, Any]:
        """The held-out measures of the model as it is."""
        size = self.recipe.batch_size
        rows, ranks = self.heldout_rows, self.ranks
        return evaluate(self.model, rows, self.task, self.pad_id, batch_size=size, together=self.together, ranks=ranks)


def statistics_of(model: nn.Module, part: Part, rows: Sequence[Batch], task: str) -> dict[str, torch.Tensor]:
    """What a part's method wants measured, on batches of one row."""
    measure = MEASURES[part.method.statistics or ""]
    if task == "causal":
        ends_with_head(model)  # by a trial, once: what goes through the model then is not to be measured
    return measure(model, rows, part.where, loss=lambda m, batch: loss_sum(m, batch, task)[0])
