"""Lion: the sign of an average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trimtab.core.transform import State, Transform, size, within, zeros


@dataclass(frozen=True)
class Lion(Transform):
    """u = sign(β1 m + (1−β1) g), then m ← β2 m + (1−β2) g.

    Every entry moves by exactly the learning rate. State: m in fp32, 0 at the start: 4 bytes per value, half of
    AdamW's. Costs three passes over the tensor.
    arXiv 2302.06675, which takes a third to a tenth of AdamW's learning rate and as much more decay.
    """

    paper: ClassVar[str] = "2302.06675"
    learning_rate: ClassVar[float] = 0.2
    """Between the third and the tenth of AdamW's that the paper takes: a sign is a longer step than Adam's."""

    beta1: float = 0.9
    beta2: float = 0.99

    def __post_init__(self) -> None:
        within(self, "beta1", 0, 1)
        within(self, "beta2", 0, 1)

    def init(self, p: Tensor) -> State:
        return {"m": zeros(p)}

    def update(self, g: Tensor, s: State, p: Tensor) -> Tensor:
        m = s["m"]
        u = m.mul(self.beta1).add_(g, alpha=1 - self.beta1).sign_()
        m.mul_(self.beta2).add_(g, alpha=1 - self.beta2)
        return u

    def state_bytes(self, shape: Sequence[int]) -> int:
        return 4 * size(shape)
