"""Asymmetric group-wise integers in NumPy float64, and their bit stream with Python's integers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def encode(W: Array, bits: int, group_size: int) -> tuple[Array, Array, Array]:
    """((W - min) / scale before rounding, scale, zero) with groups along the last axis."""
    groups = W.reshape(*W.shape[:-1], -1, group_size)
    low, high = groups.min(-1), groups.max(-1)
    scale = (high - low) / (2**bits - 1)
    scale = np.where(scale == 0, 1.0, scale)
    return ((groups - low[..., None]) / scale[..., None]).reshape(W.shape), scale, -low / scale


def decode(codes: Array, scale: Array, zero: Array, group_size: int) -> Array:
    """(q - zero) scale."""
    spread = [np.repeat(tensor, group_size, axis=-1) for tensor in (scale, zero)]
    return (codes - spread[1]) * spread[0]


def stream(codes: NDArray[np.int64], bits: int) -> bytes:
    """Codes written one after the other, each with its highest bit first, filled up with zero bits to whole words."""
    text = "".join(format(int(code), f"0{bits}b") for code in codes.reshape(-1))
    word = {2: 8, 3: 24, 4: 8, 8: 8}[bits]
    text += "0" * (-len(text) % word)
    return int(text, 2).to_bytes(len(text) // 8, "big")
