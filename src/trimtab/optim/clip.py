"""Clip: a bound on every entry of a gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trimtab.core.transform import State, Transform, within


@dataclass(frozen=True)
class Clip(Transform):
    """u = clamp(g, −value, value), for a chain: no entry of a gradient is larger than `value`.

    No state: 0 bytes. Costs a pass over the gradient. Unlike clipping by the norm of all gradients it needs nothing but
    the tensor itself, so a rule that steps in backward has it in one pass. arXiv 2306.09782, section 3.3.1.
    """

    paper: ClassVar[str] = "2306.09782"

    value: float = 1.0

    def __post_init__(self) -> None:
        within(self, "value", 0, float("inf"))

    def update(self, g: Tensor, s: State, p: Tensor) -> Tensor:
        return g.clamp(-self.value, self.value)
