"""How many rows are kept from training where a limit leaves rows out."""

from __future__ import annotations

import pytest

from trimtab.compare.setup import JUDGED
from trimtab.core.errors import UserError
from trimtab.data.splitting import held_amount, share_in_use


@pytest.mark.parametrize(
    ("heldout", "limit", "rows", "expected"),
    [
        (0.2, None, 67349, 0.2),  # everything is used: the share is split's to take
        (300, 2000, 67349, 300),  # a number is a number
        (0.2, 2000, 67349, JUDGED),  # a fifth of 2,500 would be too few to tell methods apart
        (0.2, 20000, 67349, 5000),  # a fifth of the 25,000 that are used
        (0.5, 20000, 67349, 20000),
        (0.2, 2000, 4000, 800),  # never more than the share of all rows
        (0.2, 5000, 4000, 800),
        (0.1, 1, 4, 1),
        (1.5, 10, 100, 1.5),  # split refuses it
    ],
)
def test_a_share_is_of_the_rows_in_use(heldout: float, limit: int | None, rows: int, expected: float) -> None:
    assert share_in_use(heldout, rows, limit, JUDGED) == expected


def test_how_much_is_held_out_is_a_share_or_a_number() -> None:
    assert (held_amount("0.1"), held_amount("200")) == (0.1, 200)
    with pytest.raises(UserError, match="no file, share or number"):
        held_amount("some")
    with pytest.raises(UserError, match="no such file"):
        held_amount("rows.jsonl")
