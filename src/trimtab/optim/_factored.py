"""The factored second moment that Adafactor and AdaLomo share: a row and a column of averages in place of a matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.core.transform import State, size, zeros

TINY = 1e-30
"""Added to squared gradients, ε1 of the paper."""


def begin(p: Tensor) -> State:
    """R (..., n) and C (..., m) of a tensor of (..., n, m); V of a vector."""
    if p.ndim < 2:
        return {"V": zeros(p)}
    return {"R": zeros(p, *p.shape[:-1]), "C": zeros(p, *p.shape[:-2], p.shape[-1])}


def direction(g: Tensor, s: State, beta: float, threshold: float) -> Tensor:
    """û = g / √V̂ with V̂ = R Cᵀ / mean(R), divided by max(1, RMS(û) / threshold)."""
    squared = g.square().add_(TINY)
    if g.ndim < 2:
        u = g * s["V"].lerp_(squared, 1 - beta).rsqrt()
    else:
        R, C = s["R"].lerp_(squared.mean(-1), 1 - beta), s["C"].lerp_(squared.mean(-2), 1 - beta)
        u = g * (R / R.mean(-1, keepdim=True)).rsqrt()[..., None] * C.rsqrt()[..., None, :]
    return u.div_((rms(u) / threshold).clamp(min=1.0))


def rms(x: Tensor) -> Tensor:
    """√ of the mean square."""
    return torch.linalg.vector_norm(x) / math.sqrt(x.numel())


def held(shape: Sequence[int]) -> int:
    """Bytes of R and C, or of V."""
    return 4 * (size(shape) if len(shape) < 2 else size(shape[:-1]) + size(shape[:-2]) * shape[-1])
