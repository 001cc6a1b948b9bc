"""The rows of one step, shared out over processes so that each has about as many tokens to compute."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.data.batches import length_of
from trimtab.data.encoded import Encoded
from trimtab.data.packing import SHARE


def shares(rows: Sequence[Encoded], count: int, *, common: bool = False) -> list[list[int]]:
    """The indices of the rows of each process, in the order of the rows; every process gets one while there are any.

    The longest row goes first, each to the process that then has least to do. With `common`, what a row has in common
    with one that a process has already costs nothing there: it stands once in the pack.
    """
    loads, found = [0] * count, [list[int]() for _ in range(count)]
    begun: list[dict[tuple[int, ...], Encoded]] = [{} for _ in range(count)]
    for index in sorted(range(len(rows)), key=lambda at: (-length_of(rows[at]), at)):
        row = rows[index]
        start = tuple(row.ids[:SHARE])
        costs = [length_of(row) - (common_length(row, held.get(start)) if common else 0) for held in begun]
        idle = [at for at in range(count) if not found[at]]
        place = min(idle or range(count), key=lambda at: (loads[at] + costs[at], at))
        loads[place] += costs[place]
        found[place].append(index)
        begun[place].setdefault(start, row)
    return [sorted(one) for one in found]


def common_length(row: Encoded, other: Encoded | None) -> int:
    """How many first tokens two rows have in common, where these are worth a segment."""
    if other is None:
        return 0
    low, high = 0, min(len(row.ids), len(other.ids))
    while low < high:
        middle = (low + high + 1) // 2
        if row.ids[low:middle] == other.ids[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low if low >= SHARE else 0
