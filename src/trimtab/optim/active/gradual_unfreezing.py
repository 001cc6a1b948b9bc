"""GradualUnfreezing: from the head downwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trimtab.core.active import Active


@dataclass(frozen=True)
class GradualUnfreezing(Active):
    """on(t) = {head} ∪ the last 1 + ⌊t / every⌋ blocks; the embedding joins when all blocks train.

    The layers nearest to the output, which are the most special to a task, learn first. What has begun goes on. State
    bytes: those of what trains, at the end of everything. A backward ends at the lowest block that trains. Costs
    nothing itself.
    arXiv 1801.06146, section 3.3, where a block joins after each epoch.
    """

    paper: ClassVar[str] = "1801.06146"

    every: int = 100

    def on(self, step: int, layers: int, seed: int) -> frozenset[int]:
        lowest = layers - 1 - step // self.every
        return frozenset(range(max(lowest, -1), layers + 1))
