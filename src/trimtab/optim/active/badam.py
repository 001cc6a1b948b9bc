"""BAdam: one block after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trimtab.core.active import Active
from trimtab.core.errors import UserError

ORDERS = ("random", "descending", "ascending")


@dataclass(frozen=True)
class BAdam(Active):
    """on(t) = {block number ⌊t / every⌋ of a round through all blocks}: block coordinate descent.

    `order` is random, drawn anew for each round, descending (from the last block) or ascending. Every switch drops all
    optimizer state. With `outside` what is not in a block trains all the time, otherwise never. State bytes: those of
    one block. A backward ends at the block that trains. Costs nothing itself.
    arXiv 2404.02827, which advises steps between 50 and 100, about rows / (rows per step · blocks). The official code's
    first block has a step less.
    """

    paper: ClassVar[str] = "2404.02827"
    resets: ClassVar[bool] = True

    every: int = 100
    order: str = "random"
    outside: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in ORDERS:
            raise UserError(f"BAdam: order={self.order!r}", fix=f"one of {', '.join(ORDERS)}")

    def on(self, step: int, layers: int, seed: int) -> frozenset[int]:
        turn, at = divmod(step // self.every, layers)
        block = {
            "random": self.shuffled(layers, seed, turn)[at],
            "descending": layers - 1 - at,
            "ascending": at,
        }[self.order]
        return frozenset({block, -1, layers} if self.outside else {block})
