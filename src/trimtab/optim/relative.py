"""Relative: steps in proportion to the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trimtab.core.transform import State, Transform
from trimtab.optim._factored import rms


@dataclass(frozen=True)
class Relative(Transform):
    """u = max(ε2, RMS(p))·g, for a chain: a step in proportion to the root mean square of the weight.

    No state: 0 bytes. Costs a pass over the weight.
    arXiv 1804.04235, section 8.
    """

    paper: ClassVar[str] = "1804.04235"
    reads_weight: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 20.0
    """The weights of a language model are about a twentieth in size."""

    smallest: float = 1e-3

    def update(self, g: Tensor, s: State, p: Tensor) -> Tensor:
        return rms(p.to(g.dtype)).clamp(min=self.smallest) * g
