"""Symmetric 8-bit integers in NumPy float64, from their equations."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def parts(W: Array, block_size: int | None) -> list[Array]:
    """Rows, or runs of `block_size` values in row-major order."""
    if block_size is None:
        return list(W.reshape(-1, W.shape[-1]))
    flat = W.reshape(-1)
    return [flat[start : start + block_size] for start in range(0, flat.size, block_size)]


def encode(W: Array, block_size: int | None) -> tuple[Array, Array]:
    """(127 W / absmax before rounding, absmax of every part)."""
    scaled, largest = [], []
    for part in parts(W, block_size):
        absmax = np.max(np.abs(part))
        largest.append(absmax)
        scaled.append(127 * part / absmax if absmax > 0 else np.zeros_like(part))
    return np.concatenate(scaled).reshape(W.shape), np.array(largest)


def decode(codes: Array, absmax: Array, block_size: int | None) -> Array:
    """absmax q / 127."""
    found = [part * scale / 127 for part, scale in zip(parts(codes, block_size), absmax, strict=True)]
    return np.concatenate(found).reshape(codes.shape)
