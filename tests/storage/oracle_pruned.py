"""Pruned matrices in NumPy: what is left of each group of entries, and the bits that say where."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def without_smallest(W: Array, drop: int, group: int) -> Array:
    """W with the `drop` entries of smallest magnitude of each run of `group` entries set to zero."""
    rows = W.reshape(-1, group).copy()
    for row in rows:
        for place in sorted(range(group), key=lambda at: abs(row[at]))[:drop]:
            row[place] = 0.0
    return rows.reshape(W.shape)


def bitmap(kept: NDArray[np.bool_]) -> bytes:
    """One bit per entry, the first one highest, filled up with zeros to whole bytes."""
    text = "".join("1" if one else "0" for one in kept.reshape(-1))
    text += "0" * (-len(text) % 8)
    return bytes(int(text[at : at + 8], 2) for at in range(0, len(text), 8))
