"""What a contest tells while it goes: this base class is silent, the command line draws a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class Watcher:
    """Called by the contest; override what you want to see."""

    def stage(self, text: str) -> None:
        """A part of the contest begins."""

    def note(self, text: str) -> None:
        """Something was decided."""

    def began(self, entry: Any, stage: str) -> None:
        """A run begins, or is found on file."""

    def ran(self, entry: Any, stage: str, run: Mapping[str, Any], table: Sequence[Mapping[str, Any]]) -> None:
        """A run ended; `table` has the standings so far."""
