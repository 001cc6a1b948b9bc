"""InBackward: another transform, stepping inside backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trimtab.core.transform import State, Transform, named


@dataclass(frozen=True)
class InBackward(Transform):
    """u = inner(g), each parameter at once when its gradient is there, which is dropped then.

    The same steps as without it, and no more than one layer's gradients in memory. State bytes and cost are those of
    `inner`; clipping by the norm of all gradients takes a second forward and backward. One backward a step: no
    accumulation. `InBackward(GaLore())` is what GaLore's paper calls per-layer updates. arXiv 2306.09782.
    """

    paper: ClassVar[str] = "2306.09782"

    inner: str | Transform = "adamw"

    @property
    def inners(self) -> tuple[Transform, ...]:
        return (named(self.inner),)

    @property
    def in_backward(self) -> bool:
        return True

    def init(self, p: Tensor) -> State:
        return self.inners[0].init(p)

    def update(self, g: Tensor, s: State, p: Tensor) -> Tensor:
        return self.inners[0].update(g, s, p)

    def state_bytes(self, shape: Sequence[int]) -> int:
        return self.inners[0].state_bytes(shape)
