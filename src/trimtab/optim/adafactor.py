"""Adafactor: a second moment of one row and one column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trimtab.core.transform import COUNTER, State, Transform, counter, size, tick, within, zeros
from trimtab.optim import _factored as factored


@dataclass(frozen=True)
class Adafactor(Transform):
    """u = û / max(1, RMS(û)/d), û = g / √(R Cᵀ / mean R), R ← β R + (1−β) mean_cols(g²), C likewise, β = 1 − t^−power.

    Adam without a first moment, its second one kept as a product of rank 1. State of an (n, m) matrix: R (n) and C (m)
    in fp32: 4 (n + m) bytes, 8 for t; a vector keeps all of g². With `beta1` above 0 a first moment of u, 4 bytes per
    value. Costs a few passes over the tensor.
    arXiv 1804.04235, algorithm 4, with d = 1 and g² + 1e-30. The step is not relative to the size of the weight, as
    transformers recommends for fine-tuning; the paper's is `Chain((Adafactor(), Relative()))`.
    """

    paper: ClassVar[str] = "1804.04235"

    power: float = 0.8
    threshold: float = 1.0
    beta1: float = 0.0

    def __post_init__(self) -> None:
        within(self, "beta1", 0, 1)

    def init(self, p: Tensor) -> State:
        first = {"m": zeros(p)} if self.beta1 else {}
        return {"t": counter(), **factored.begin(p), **first}

    def update(self, g: Tensor, s: State, p: Tensor) -> Tensor:
        u = factored.direction(g, s, 1 - tick(s) ** -self.power, self.threshold)
        return s["m"].lerp_(u, 1 - self.beta1) if self.beta1 else u

    def state_bytes(self, shape: Sequence[int]) -> int:
        return factored.held(shape) + (4 * size(shape) if self.beta1 else 0) + COUNTER
