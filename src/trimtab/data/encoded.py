"""Encoded rows, and the report of what became of the examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

from trimtab.data.examples import Label

Labels = tuple[Label, ...] | Literal["regression"]
"""The classes in the order of their numbers, or that labels are numbers to regress to."""


@dataclass(frozen=True)
class Encoded:
    """One sequence: its ids, which of them are learned, or its label; `types` are segment ids where a pair has them."""

    ids: list[int]
    trained: list[bool]
    label: int | float | None = None
    types: list[int] | None = None
    row: int = 0
    source: list[int] | None = None
    """What an encoder-decoder reads; `ids` are then its start token and what it is to write."""

    @property
    def targets(self) -> int:
        """How many of its positions a causal model is trained to predict: the first token never is."""
        return sum(self.trained[1:])


@dataclass(frozen=True)
class Report:
    """What became of the examples; every row that was cut, split or left out is counted here."""

    rows: int
    """Examples given."""
    sequences: int
    """Sequences made of them."""
    over_long: int
    """Rows of more than `max_length` tokens."""
    truncated: int
    """Over-long rows that were cut."""
    dropped: int
    """Over-long rows that were left out."""
    split: int
    """Over-long rows that were cut in several sequences, with nothing lost."""
    masked: int
    """Rows left out since cutting took every trained token."""
    empty: int
    """Rows left out since they have nothing to learn: a blank completion, or no trained assistant turn."""
    duplicates: int
    """Sequences equal to an earlier one; they are kept."""
    prompt_differs: int
    """Rows whose last prompt, alone as in generation, splits into other tokens than before its completion."""
    special_text: int
    """Rows whose own text spells a special token, so that it is read as one."""
    trained_tokens: int
    """Positions predicted after the causal shift; for labelled rows, labels."""
    total_tokens: int
    longest: int
    """Tokens of the longest row, before any cut."""
    longest_row: int
    max_length: int | None
    truncation: str
    train_on: str
    template: str
    """chat, plain, or none for labelled rows."""
    separator: str
    fingerprint: str
    notes: tuple[str, ...] = ()
    """What a person should read before training, one sentence each."""

    def summary(self) -> str:
        """A few lines for people."""
        cut = ", ".join(
            f"{count} {what}"
            for count, what in (
                (self.truncated, f"truncated ({self.truncation})"),
                (self.dropped, "dropped as over-long"),
                (self.split, "split"),
                (self.masked, "left with nothing trained"),
                (self.empty, "empty"),
                (self.duplicates, "duplicates kept"),
            )
            if count
        )
        share = self.trained_tokens / max(1, self.total_tokens)
        trained = f"{self.trained_tokens} of {self.total_tokens} tokens trained ({share:.0%})"
        if self.template == "none":
            trained = f"{self.total_tokens} tokens, {self.trained_tokens} labels"
        longest = f"longest {self.longest} (row {self.longest_row})"
        first = f"{self.rows} rows -> {self.sequences} sequences; {trained}; {longest}"
        return "\n".join([first, cut or "nothing cut or left out", *(f"note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class EncodedSet(Sequence[Encoded]):
    """The sequences of a data set, the labels they count by, and the report of how they came about."""

    items: tuple[Encoded, ...]
    report: Report
    labels: Labels | None = None
    """Give them to `encode_all` for held-out data, so that the same label has the same number."""

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Encoded, ...]: ...

    def __getitem__(self, index: int | slice) -> Encoded | tuple[Encoded, ...]:
        return self.items[index]
