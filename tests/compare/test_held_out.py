"""How many rows a contest keeps from training."""

from __future__ import annotations

import pytest

from trimtab.compare.setup import JUDGED, Setup, held_out
from trimtab.core.errors import UserError


def kept(heldout: str, limit: int | None, rows: int) -> int | float:
    return held_out(Setup(model="-", data="-", methods=("lora",), heldout=heldout, limit=limit), rows)


@pytest.mark.parametrize(
    ("heldout", "limit", "rows", "expected"),
    [
        ("0.2", None, 67349, 0.2),  # everything is used: the share is split's to take
        ("300", 2000, 67349, 300),  # a number is a number
        ("0.2", 2000, 67349, JUDGED),  # a fifth of 2,500 would be too few to tell methods apart
        ("0.2", 20000, 67349, 5000),  # a fifth of the 25,000 that are used
        ("0.5", 20000, 67349, 20000),
        ("0.2", 2000, 4000, 800),  # never more than the share of all rows
        ("0.2", 5000, 4000, 800),
        ("0.1", 1, 4, 1),
    ],
)
def test_a_share_is_of_the_rows_in_use(heldout: str, limit: int | None, rows: int, expected: float) -> None:
    assert kept(heldout, limit, rows) == expected


def test_what_is_no_share_stays_an_error() -> None:
    assert kept("1.5", 10, 100) == 1.5  # split refuses it
    with pytest.raises(UserError, match="no file, share or number"):
        kept("some", 10, 100)
