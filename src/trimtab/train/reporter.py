"""What a run tells while it goes: this base class is silent, the command line draws a progress bar."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Reporter:
    """Called by the training loop; override what you want to see."""

    def stage(self, text: str) -> None:
        """A new part of the work has begun."""

    def note(self, text: str) -> None:
        """Something was decided or noticed that the user should read."""

    def start(self, steps: int, rows: int, done: tuple[int, int] = (0, 0)) -> None:
        """Training begins: so many optimizer steps over so many rows, of which `done` are behind a resumed run."""

    def step(self, metrics: Mapping[str, Any]) -> None:
        """One optimizer step is done."""

    def evaluated(self, when: str, metrics: Mapping[str, Any]) -> None:
        """The held-out part was measured, `before` or `after` training."""

    def finish(self, result: Any) -> None:
        """The run is over and everything is on disk."""
