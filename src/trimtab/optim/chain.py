"""Chain: one transform after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from trimtab.core.transform import State, Transform, named


@dataclass(frozen=True)
class Chain(Transform):
    """u = f_k(… f_2(f_1(g))): what one transform returns is the gradient of the next.

    State: those of its parts, one after another; bytes and cost are their sums. The empty chain is plain gradient
    descent. `Chain((Clip(1.0), "adafactor", Relative()))`; parts may be names.
    """

    parts: Sequence[str | Transform] = ()

    @property
    def inners(self) -> tuple[Transform, ...]:
        return tuple(named(part) for part in self.parts)

    def init(self, p: Tensor) -> State:
        return {str(at): part.init(p) for at, part in enumerate(self.inners)}

    def update(self, g: Tensor, s: State, p: Tensor) -> Tensor:
        for at, part in enumerate(self.inners):
            g = part.update(g, s[str(at)], p)
        return g
