"""SGD: gradient descent, with momentum if asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trimtab.core.transform import State, Transform, size, within, zeros


@dataclass(frozen=True)
class SGD(Transform):
    """u = m, with m ← μ m + g; without momentum u = g.

    Steps as large as the gradient is. State: m in fp32, 0 at the start: 4 bytes per value; none for μ = 0. Costs one
    pass over the tensor.
    arXiv 1609.04747, section 4.1; the same as `torch.optim.SGD` without dampening. An L2 penalty in the loss, which
    torch calls `weight_decay`, is `Chain((Decay(rate), SGD(momentum)))`.
    """

    paper: ClassVar[str] = "1609.04747"
    learning_rate: ClassVar[float] = 100.0
    """Entries of a clipped gradient are some thousandths, and momentum adds up ten of them."""

    momentum: float = 0.9

    def __post_init__(self) -> None:
        within(self, "momentum", 0, 1)

    def init(self, p: Tensor) -> State:
        return {"m": zeros(p)} if self.momentum else {}

    def update(self, g: Tensor, s: State, p: Tensor) -> Tensor:
        return s["m"].mul_(self.momentum).add_(g) if self.momentum else g

    def state_bytes(self, shape: Sequence[int]) -> int:
        return 4 * size(shape) if self.momentum else 0
