"""The text of one answer: pieces that can be sent at once, cut where a stop string begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trimtab.evaluate.generate import Growing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Answer:
    """Text that grows by tokens. What may be the beginning of a stop string is held back until it is known."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self.growing, self.stops = Growing(tokenizer), tuple(stops)
        self.held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that a token makes certain."""
        return self.cut(self.growing.add(token))

    def rest(self) -> str:
        """What was held back, once no more tokens come."""
        if self.stopped:
            return ""
        said = self.cut(self.growing.rest())
        return said if self.stopped else said + self.held

    def cut(self, piece: str) -> str:
        """Take in a piece; returns what is certain now."""
        text = self.held + piece
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        keep = max((overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without being all of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
