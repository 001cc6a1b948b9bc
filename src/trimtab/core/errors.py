"""Errors a user can cause: one message with what is wrong, where, what was found, and the nearest fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend. The command line prints it and exits with code 2; a library caller may catch it."""

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        self.message = message
        self.fix = fix
        super().__init__(message if fix is None else f"{message}\n  fix: {fix}")


def nearest(word: str, choices: Iterable[str], n: int = 3) -> list[str]:
    """The `n` choices most like `word`, best first; case is ignored. Empty when nothing is close."""
    originals: dict[str, str] = {}
    for choice in choices:
        originals.setdefault(choice.lower(), choice)
    return [originals[match] for match in difflib.get_close_matches(word.lower(), originals, n=n, cutoff=0.5)]


def listing(items: Iterable[str], limit: int = 10) -> str:
    """`a, b, c (+12 more)`: at most `limit` items of a list, and how many were left out."""
    names = list(items)
    left = len(names) - limit
    return ", ".join(names[:limit]) + (f" (+{left} more)" if left > 0 else "")
