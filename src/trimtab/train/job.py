"""Everything a run has decided before its first step."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trimtab.core.errors import UserError
from trimtab.core.fisher import MEASURES
from trimtab.core.machine import host_memory
from trimtab.core.state import Part
from trimtab.data.batches import collate
from trimtab.data.encoded import Encoded, EncodedSet
from trimtab.data.mixture import Mixed
from trimtab.data.packing import SHARE, Bag, Pack, bag, pack
from trimtab.data.shares import shares
from trimtab.engine.attention import edited_ends
from trimtab.engine.bottom import Bottom, computed, frozen_blocks, on_bottom
from trimtab.engine.encoder import Seam
from trimtab.engine.faster import running
from trimtab.engine.heap import heap_kept
from trimtab.engine.loss import Batch, ends_with_head, loss_sum, on
from trimtab.engine.ranks import ALONE, Ranks
from trimtab.evaluate.loss import evaluate
from trimtab.train.recipe import Recipe
from trimtab.train.reporter import Reporter
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
    bottom: Bottom | None = None
    """What the frozen blocks below all that trains make of the training rows, while they are kept."""

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
        made = self.together([self.train_rows[index] for index in indices])
        if self.bottom is not None and not isinstance(made, dict):
            made = replace(made, hidden=self.bottom.of(made, indices))
        return on(made, self.device)

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

    @contextmanager
    def on_bottom(self, tell: Reporter) -> Iterator[None]:
        """Within `running`: what the frozen bottom makes of the training rows is kept, where it can be and pays."""
        why = self.no_bottom()
        if why is None:
            tell.stage("computing the frozen blocks once")
            started = time.perf_counter()
            depth, size = frozen_blocks(self.model), self.recipe.batch_size
            groups = (range(at, min(at + size, len(self.train_rows))) for at in range(0, len(self.train_rows), size))
            parts = (self.alone([self.train_rows[row] for row in group]) for group in groups)
            if self.task == "causal":
                ends_with_head(self.model)  # by a trial, once: what goes through the model then is not to be kept
            self.bottom = computed(self.model, depth, parts, lambda batch: loss_sum(self.model, batch, self.task))
            why = "something is drawn anew or trains below the blocks" if self.bottom is None else None
            self.record["bottom_seconds"] = round(time.perf_counter() - started, 3)
        if self.bottom is not None:
            tell.note(
                f"the lowest {self.bottom.depth} blocks, in which nothing trains, were computed once for all rows"
            )
        elif self.recipe.bottom == "cached":
            raise UserError(f"bottom: the frozen blocks cannot be computed once: {why}", fix="bottom: auto")
        try:
            with on_bottom(self.model, self.bottom):
                yield
        finally:
            self.bottom = None

    def alone(self, rows: Sequence[Encoded]) -> Pack | Bag:
        """Rows as one sequence that shares nothing, on the model's device."""
        made = pack(rows, None) if self.seam is None else bag(rows, self.seam.first_position)
        return made.to(self.device)

    def no_bottom(self) -> str | None:
        """Why the outputs of the frozen bottom are not kept; None where they may be."""
        asked = self.recipe.bottom
        if asked == "computed" or (asked == "auto" and self.steps <= self.steps_per_epoch):
            return "nobody asked for it" if asked == "computed" else "rows are met once"
        if self.packing == "off" or self.ranks.size > 1:
            return "rows are padded" if self.packing == "off" else "several processes run"
        if self.recipe.checkpointing == "sqrt":
            return "checkpointing: sqrt runs blocks in groups"
        if not frozen_blocks(self.model):
            return "something trains in the lowest block, or virtual tokens go through it"
        size = self.bottom_bytes()
        return (
            f"they take {size:,} bytes, over a quarter of this machine's memory" if size > host_memory() / 4 else None
        )

    def bottom_bytes(self) -> int:
        """What the outputs of a block take for all training rows."""
        kind: torch.dtype = getattr(torch, self.record["model"]["dtype"])
        return sum(len(row.ids) for row in self.train_rows) * width_of(self.model) * kind.itemsize

    def measure_again(self, part: Part, step: int) -> dict[str, torch.Tensor]:
        """The statistics of a part on some training rows, other ones after every step."""
        generator = torch.Generator().manual_seed(self.recipe.seed + step)
        chosen = torch.randperm(len(self.train_rows), generator=generator)[:MEASURED_ROWS].tolist()
        rows = [on(self.together([self.train_rows[index]]), self.device) for index in chosen]
        return statistics_of(self.model, part, rows, self.task)

    def measure(self) -> dict[str, Any]:
        """The held-out measures of the model as it is."""
        return self.measured_on(self.heldout_rows)

    def measure_each(self) -> dict[str, Any]:
        """The same, and the loss on the rows of each data set of a mixture."""
        rows = self.heldout_rows
        parts = [(name, rows.part(at)) for at, name in enumerate(rows.names)] if isinstance(rows, Mixed) else []
        return self.measure() | {f"loss ({name})": self.measured_on(part)["loss"] for name, part in parts}

    def measured_on(self, rows: EncodedSet) -> dict[str, Any]:
        """The measures of the model on some rows."""
        how: dict[str, Any] = {"batch_size": self.recipe.batch_size, "together": self.together, "ranks": self.ranks}
        return evaluate(self.model, rows, self.task, self.pad_id, **how)


def statistics_of(model: nn.Module, part: Part, rows: Sequence[Batch], task: str) -> dict[str, torch.Tensor]:
    """What a part's method wants measured, on batches of one row."""
    measure = MEASURES[part.method.statistics or ""]
    if task == "causal":
        ends_with_head(model)  # by a trial, once: what goes through the model then is not to be measured
    return measure(model, rows, part.where, loss=lambda m, batch: loss_sum(m, batch, task)[0])


def width_of(model: nn.Module) -> int:
    """Width of the residual stream."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "hidden_size", None) or getattr(text, "d_model", None) or 1024)
