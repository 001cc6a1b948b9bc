"""AdaLomo: LOMO with a factored second moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trimtab.core.transform import COUNTER, State, Transform, counter, tick, within
from trimtab.optim import _factored as factored


@dataclass(frozen=True)
class AdaLomo(Transform):
    """u = max(ε, RMS(p))·û / max(1, RMS(û)), û = g / √(R Cᵀ / mean R), R ← β R + (1−β) mean_cols(g²), β = 1 − t^−power.

    Adafactor's step relative to the weight, each tensor at once when its gradient is there, which is dropped then. The
    step's size is bounded for each tensor, so it needs no clipping by the norm of all gradients (set `clip` to 0:
    otherwise a second forward and backward). State of an (n, m) matrix: R (n) and C (m) in fp32, 4 (n + m) bytes, 8 for
    t; a vector keeps all of g². Costs a few passes over the tensor. One backward a step: no accumulation.
    arXiv 2310.10195. Decay goes with the learning rate alone, in the official code with max(ε, RMS(p)) too.
    """

    paper: ClassVar[str] = "2310.10195"
    learning_rate: ClassVar[float] = 20.0
    """As for `Relative`: the step is the rate times the size of a weight, about a twentieth."""
    reads_weight: ClassVar[bool] = True

    power: float = 0.8
    threshold: float = 1.0
    smallest: float = 1e-3

    def __post_init__(self) -> None:
        within(self, "smallest", 0, float("inf"))

    @property
    def in_backward(self) -> bool:
        return True

    def init(self, p: Tensor) -> State:
        return {"t": counter(), **factored.begin(p)}

    def update(self, g: Tensor, s: State, p: Tensor) -> Tensor:
        u = factored.direction(g, s, 1 - tick(s) ** -self.power, self.threshold)
        return u.mul_(factored.rms(p.to(g.dtype)).clamp(min=self.smallest))

    def state_bytes(self, shape: Sequence[int]) -> int:
        return factored.held(shape) + COUNTER
