"""LISA: a few layers at a time, drawn at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trimtab.core.active import Active


@dataclass(frozen=True)
class LISA(Active):
    """on(t) = {embedding, head} ∪ a random sample of `layers` blocks, drawn anew every `every` steps.

    What is outside the blocks always trains. A block that is not drawn again loses its optimizer state, one that is
    keeps it. State bytes: those of the outside and of `layers` blocks. A backward runs through all blocks as long as
    the embedding trains. Costs nothing itself.
    arXiv 2403.17919, whose runs are with 2 or 4 layers. Its experiments start anew at every switch; the official code
    never frees a state, so that its memory grows to that of Adam on everything.
    """

    paper: ClassVar[str] = "2403.17919"

    every: int = 20
    layers: int = 2

    def on(self, step: int, layers: int, seed: int) -> frozenset[int]:
        drawn = self.shuffled(layers, seed, step // self.every)[: self.layers]
        return frozenset({-1, layers, *drawn})
