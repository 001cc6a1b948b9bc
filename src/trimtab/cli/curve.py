"""A curve drawn with characters."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def curve(values: Sequence[float], *, width: int = 60, height: int = 8, label: str = "step") -> str:
    """Values over 1, 2, ... as a small plot; where there are more than `width`, each column is a mean.

    >>> print(curve([3.0, 2.0, 1.0], height=3))
          3 |*
          2 | *
          1 |  *
            +---
            step 1 to 3
    """
    finite = [value for value in values if value == value and abs(value) != float("inf")]
    if not finite:
        return "            nothing to draw"
    count = min(width, len(finite))
    edges = [round(place * len(finite) / count) for place in range(count + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    if high == low:
        height = 1
    rows = [[" "] * count for _ in range(height)]
    for place, mean in enumerate(means):
        level = round((high - mean) / (high - low) * (height - 1)) if high > low else 0
        rows[level][place] = "*"
    lines = []
    for level, row in enumerate(rows):
        value = high - (high - low) * level / max(1, height - 1)
        named = level in (0, height - 1) or (height > 2 and level == height // 2)
        lines.append(f"{f'{value:.3g}' if named else '':>11} |{''.join(row).rstrip()}")
    return "\n".join([*lines, " " * 12 + "+" + "-" * count, " " * 12 + f"{label} 1 to {len(values)}"])
