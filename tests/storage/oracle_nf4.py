"""NF4 in NumPy float64, with the levels derived from normal quantiles instead of written down."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def levels() -> Array:
    """Eight positive and seven negative quantiles of a standard normal, evenly spaced in probability, and zero."""
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(outermost, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(outermost, 0.5, 8)[:-1]]
    found = np.sort(np.array([*positive, 0.0, *negative]))
    return found / found.max()


def encode(W: Array, block_size: int) -> tuple[Array, Array]:
    """(W / absmax before rounding, absmax of every block)."""
    flat = W.reshape(-1)
    blocks = [flat[start : start + block_size] for start in range(0, flat.size, block_size)]
    absmax = np.array([np.max(np.abs(block)) for block in blocks])
    scaled = [block / (largest if largest > 0 else 1.0) for block, largest in zip(blocks, absmax, strict=True)]
    return np.concatenate(scaled), absmax


def unpacked(packed: NDArray[np.uint8], count: int) -> NDArray[np.int64]:
    """Codes of a byte string, high half first."""
    digits = packed.reshape(-1).tobytes().hex()
    return np.array([int(digit, 16) for digit in digits[:count]])


def decode(codes: NDArray[np.int64], absmax: Array, block_size: int, shape: tuple[int, ...]) -> Array:
    """level absmax."""
    return (levels()[codes] * np.repeat(absmax, block_size)[: codes.size]).reshape(shape)
