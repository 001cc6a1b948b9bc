"""The dynamic 8-bit map in NumPy float64, from its definition."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def levels(signed: bool) -> Array:
    """A sign bit (if signed), a unary exponent of ten and, in the bits that are left, a fraction between 0.1 and 1."""
    found = [0.0, 1.0]
    for zeros in range(7):
        points = 2 ** ((7 if signed else 8) - 1 - zeros)
        width = 0.9 / points
        for point in range(points):
            value = (0.1 + width * (point + 0.5)) * 10.0**-zeros
            found += [value, -value] if signed else [value]
    return np.sort(np.array(found))


def encode(W: Array, block_size: int, signed: bool, center: bool) -> tuple[Array, Array, float]:
    """(W - offset) / absmax before rounding, absmax of every block, offset."""
    flat = W.reshape(-1)
    offset = float(flat.mean()) if center else 0.0
    flat = flat - offset
    blocks = [flat[start : start + block_size] for start in range(0, flat.size, block_size)]
    absmax = np.array([np.max(np.abs(block)) for block in blocks])
    scaled = [block / (largest if largest > 0 else 1.0) for block, largest in zip(blocks, absmax, strict=True)]
    return np.concatenate(scaled).reshape(W.shape), absmax, offset


def nearest(scaled: Array, table: Array) -> NDArray[np.int64]:
    """Index of the nearest level by comparing with all of them."""
    return np.argmin(np.abs(scaled.reshape(-1, 1) - table), axis=1).reshape(scaled.shape)


def decode(codes: NDArray[np.int64], absmax: Array, offset: float, block_size: int, table: Array) -> Array:
    """level absmax + offset."""
    scales = np.repeat(absmax, block_size)[: codes.size].reshape(codes.shape)
    return table[codes] * scales + offset
