"""GaLore: the moments live where the gradient does, in a few directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trimtab.core.transform import COUNTER, State, Transform, counter, named, zeros
from trimtab.optim import _sides as sides


@dataclass(frozen=True)
class GaLore(Transform):
    """u = scale·P inner(Pᵀ G), with P the leading `rank` left singular vectors of G, taken anew every `gap` steps.

    So for a wide matrix; a tall or square one is projected from the right, u = scale·inner(G P) Pᵀ: the smaller side is
    the one that shrinks. The weight keeps its full rank. Tensors that are no matrices, or have a side below `rank`, go
    to `inner` as they are.
    State of an (m, n) matrix with m ≤ n: P in fp32 and inner's state of (rank, n): 4·m·rank bytes + 8·rank·n for Adam,
    2.03·rank·n for `inner="adam8"`, about 4·(rank + n) for Adafactor; 8 for t. The moments stay when P changes.
    Costs 4·m·n·rank multiplications per step, and an SVD of G every `gap` steps.
    arXiv 2403.03507, whose pretraining recipe is scale 0.25 with a learning rate of 0.01, for fine-tuning rank 4, scale
    4, gap 500. The official code's ε is 1e-6, the paper's and ours 1e-8; it sees the direction in the gradient's type.
    """

    paper: ClassVar[str] = "2403.03507"

    inner: str | Transform = "adamw"
    rank: int = 128
    gap: int = 200
    scale: float = 1.0

    def __post_init__(self) -> None:
        sides.checked(self)

    @property
    def inners(self) -> tuple[Transform, ...]:
        return (named(self.inner),)

    def init(self, p: Tensor) -> State:
        if not sides.projects(p.shape, self.rank):
            return {"inner": self.inners[0].init(p)}
        R = zeros(p, *sides.reduced(p.shape, self.rank))
        return {"t": counter(), "P": zeros(p, min(p.shape), self.rank), "inner": self.inners[0].init(R)}

    def update(self, g: Tensor, s: State, p: Tensor) -> Tensor:
        if "P" not in s:
            return self.inners[0].update(g, s["inner"], p)
        if int(s["t"]) % self.gap == 0:
            s["P"].copy_(sides.directions(g, self.rank))
        s["t"] += 1
        R = sides.project(g, s["P"])
        return self.scale * sides.back(self.inners[0].update(R, s["inner"], R), s["P"], g.shape)

    def state_bytes(self, shape: Sequence[int]) -> int:
        if not sides.projects(shape, self.rank):
            return self.inners[0].state_bytes(shape)
        inner = self.inners[0].state_bytes(sides.reduced(shape, self.rank))
        return 4 * min(shape) * self.rank + inner + COUNTER
