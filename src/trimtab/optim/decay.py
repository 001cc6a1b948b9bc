"""Decay: a pull towards zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trimtab.core.transform import State, Transform


@dataclass(frozen=True)
class Decay(Transform):
    """u = g + factor·p: before a rule of a chain an L2 penalty, after it decoupled decay.

    No state: 0 bytes. Costs a pass over the weight. Decoupled decay is also `weight_decay` of the optimizer, which
    parameter groups can set apart. arXiv 1711.05101.
    """

    paper: ClassVar[str] = "1711.05101"
    reads_weight: ClassVar[bool] = True

    factor: float = 0.01

    def update(self, g: Tensor, s: State, p: Tensor) -> Tensor:
        return g + self.factor * p.to(g.dtype)
