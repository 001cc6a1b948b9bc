"""LOMO: gradient descent with no gradients to keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trimtab.core.transform import State, Transform, within


@dataclass(frozen=True)
class LOMO(Transform):
    """u = g, or clamp(g, −clip_value, clip_value): gradient descent, each tensor at once when its gradient is there.

    The gradient is dropped then, so that no more than a layer's are in memory. No state: 0 bytes. Costs a pass over the
    tensor; clipping by the norm of all gradients takes a second forward and backward, `clip_value` does not. One
    backward a step: no accumulation.
    arXiv 2306.09782, which advises clipping by value at learning rates below 1e-3. Steps are in fp32 and gradients are
    not scaled, where the official code scales the loss for fp16.
    """

    paper: ClassVar[str] = "2306.09782"
    learning_rate: ClassVar[float] = 1000.0
    """The paper's 3e-2 against some 3e-5: entries of a clipped gradient are some thousandths."""

    clip_value: float | None = None

    def __post_init__(self) -> None:
        if self.clip_value is not None:
            within(self, "clip_value", 0, float("inf"))

    @property
    def in_backward(self) -> bool:
        return True

    def update(self, g: Tensor, s: State, p: Tensor) -> Tensor:
        return g if self.clip_value is None else g.clamp(-self.clip_value, self.clip_value)
