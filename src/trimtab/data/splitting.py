"""Held-out examples and samples, chosen by content and seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from trimtab.core.errors import UserError
from trimtab.data.examples import Example

AnyExample = TypeVar("AnyExample", bound=Example)


def _order(seed: int, *parts: str) -> bytes:
    """A number that depends on nothing but seed and parts: the same on every machine and in every process."""
    content = b"".join(len(part.encode()).to_bytes(8, "big") + part.encode() for part in (str(seed), *parts))
    return hashlib.sha256(content).digest()


def split(
    examples: Sequence[AnyExample], holdout: float | int, seed: int = 0
) -> tuple[list[AnyExample], list[AnyExample]]:
    """Split into (train, held out), both in the given order, so that equal prompts never stand on both sides.

    `holdout` is a fraction between 0 and 1, or a number of examples. Groups of equal prompts (`Example.prompt_key`) are
    taken in the order of a hash of seed and prompt, each one if it brings the held-out count nearer to what was asked;
    so the count can miss it by a part of a group. A row added to the file changes little of the split.
    """
    if isinstance(holdout, bool) or (isinstance(holdout, float) and not 0 < holdout < 1) or holdout <= 0:
        raise UserError(
            f"split: holdout={holdout!r} is neither a fraction between 0 and 1 nor a positive number of examples",
            fix="e.g. holdout=0.1 or holdout=200",
        )
    wanted = max(1, round(holdout * len(examples))) if isinstance(holdout, float) else holdout
    if wanted >= len(examples):
        raise UserError(
            f"split: {wanted} held-out examples asked, but there are {len(examples)}", fix="hold out fewer examples"
        )
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(example.prompt_key(), []).append(index)
    held: set[int] = set()
    for key in sorted(groups, key=lambda key: _order(seed, *key)):
        grown = len(held) + len(groups[key])
        if abs(grown - wanted) < abs(len(held) - wanted) and grown < len(examples):
            held.update(groups[key])
        if len(held) >= wanted:
            break
    if not held:
        raise UserError(
            f"split: {len(groups)} distinct prompts in {len(examples)} examples leave no group near {wanted}",
            fix="hold out a different number, or give a file of its own for evaluation",
        )
    train = [example for index, example in enumerate(examples) if index not in held]
    return train, [example for index, example in enumerate(examples) if index in held]


def held_amount(text: str) -> float | int:
    """A share of the rows, or a number of them, as it was written."""
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        what = "no such file" if Path(text).suffix else "no file, share or number of rows"
        raise UserError(f"heldout: {text!r} is {what}", fix="a file of rows, a share (0.1) or a number (200)") from None


def share_in_use(share: float | int, rows: int, limit: int | None, least: int) -> float | int:
    """What `split` keeps of `rows` rows where only `limit` of them train: a share of those in use, not of the file.

    Of more than that share only up to `least` rows: measuring on all others would take longer than the training.
    A number of rows, a share without a limit and what is no share are returned as they are.
    """
    if isinstance(share, int) or limit is None or not 0 < share < 1:
        return share
    return min(max(1, round(share * rows)), max(round(limit * share / (1 - share)), least))


def take(examples: Sequence[AnyExample], limit: int | None, seed: int | None = None) -> list[AnyExample]:
    """At most `limit` examples, in the given order: the first, or with a seed a sample that depends on it alone."""
    if limit is not None and (isinstance(limit, bool) or limit < 1):
        raise UserError(f"take: limit={limit!r} is not a positive number of examples", fix="e.g. limit=1000")
    if limit is None or limit >= len(examples):
        return list(examples)
    if seed is None:
        return list(examples[:limit])
    chosen = sorted(range(len(examples)), key=lambda index: _order(seed, str(index)))[:limit]
    return [examples[index] for index in sorted(chosen)]
