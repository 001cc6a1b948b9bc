"""What happens to rows on the way to token ids, counted, and refused where nothing would be learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trimtab.core.errors import UserError, listing
from trimtab.data.encoded import Encoded, EncodedSet, Labels, Report
from trimtab.data.examples import Example
from trimtab.data.wording import Chat, Plain, fingerprint_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Settings:
    """What `encode_all` was asked for, as far as counting needs it."""

    max_length: int | None
    truncation: str
    train_on: str


@dataclass
class Counts:
    """Row numbers by what happened to them."""

    over_long: list[int] = field(default_factory=list)
    truncated: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    split: list[int] = field(default_factory=list)
    masked: list[int] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)
    prompt_differs: list[int] = field(default_factory=list)
    special_text: list[int] = field(default_factory=list)
    open_turn: list[int] = field(default_factory=list)
    rewritten: list[int] = field(default_factory=list)
    touching: list[int] = field(default_factory=list)
    longest: int = 0
    longest_row: int = 0

    def measure(self, row: int, length: int, max_length: int | None) -> bool:
        """Note a row's length; true if it is over the limit."""
        if length > self.longest:
            self.longest, self.longest_row = length, row
        over = max_length is not None and length > max_length
        if over:
            self.over_long.append(row)
        return over


def numbered(examples: Sequence[Example]) -> Iterator[tuple[int, Example]]:
    """Each example with the number a person knows it by."""
    for position, example in enumerate(examples, start=1):
        yield example.row or position, example


def listed_rows(rows: Sequence[int]) -> str:
    """Row numbers in words."""
    return ("row " if len(rows) == 1 else "rows ") + listing(str(row) for row in rows)


def refuse_over_long(counts: Counts, rows: int, settings: Settings, text: bool) -> None:
    """One error for all rows over the limit, where that is the policy."""
    if counts.over_long and settings.truncation == "error":
        several = len(counts.over_long) > 1
        raise UserError(
            f"{len(counts.over_long)} of {rows} rows {'are' if several else 'is'} longer than "
            f"max_length={settings.max_length} tokens: {listed_rows(counts.over_long)}; the longest is row "
            f"{counts.longest_row} with {counts.longest} tokens",
            fix=f"max_length={counts.longest}, or truncation='drop', 'right' or 'left'"
            + (" or 'split'" if text else ""),
        )


def finished(
    examples: Sequence[Example],
    made: list[Encoded],
    labels: Labels | None,
    counts: Counts,
    settings: Settings,
    wording: Chat | Plain | None,
    tokenizer: PreTrainedTokenizerBase,
    trained_tokens: int,
) -> EncodedSet:
    """Refuse a set in which nothing is trained, and write the report."""
    if not trained_tokens:
        reasons = [
            f"{len(rows)} {what}"
            for rows, what in (
                (counts.empty, "have nothing to learn (blank completions, or no trained assistant turn)"),
                (counts.dropped, f"are longer than max_length={settings.max_length} and were dropped"),
                (counts.masked, f"lost every trained token to truncation={settings.truncation!r}"),
            )
            if rows
        ]
        raise UserError(
            f"not one token of {len(examples)} rows would be trained: {'; '.join(reasons) or 'all are one token long'}",
            fix="raise max_length, or give rows with completions" if counts.over_long else "give rows with completions",
        )
    distinct = {(tuple(item.source or ()), tuple(item.ids), tuple(item.trained), item.label) for item in made}
    source = "" if wording is None else wording.source
    report = Report(
        rows=len(examples),
        sequences=len(made),
        over_long=len(counts.over_long),
        truncated=len(counts.truncated),
        dropped=len(counts.dropped),
        split=len(counts.split),
        masked=len(counts.masked),
        empty=len(counts.empty),
        duplicates=len(made) - len(distinct),
        prompt_differs=len(counts.prompt_differs),
        special_text=len(counts.special_text),
        trained_tokens=trained_tokens,
        total_tokens=sum(len(item.ids) + len(item.source or ()) for item in made),
        longest=counts.longest,
        longest_row=counts.longest_row,
        max_length=settings.max_length,
        truncation=settings.truncation,
        train_on=settings.train_on,
        template="none" if wording is None else wording.name,
        separator="" if wording is None else wording.separator,
        fingerprint=fingerprint_of(tokenizer, source),
        notes=tuple(notes_of(counts, settings, source)),
    )
    return EncodedSet(tuple(made), report, labels)


def notes_of(counts: Counts, settings: Settings, source: str) -> Iterator[str]:
    """One sentence for everything that a person should know."""
    limit = f"max_length={settings.max_length}"
    texts = (
        (counts.truncated, f"over {limit}, cut (truncation={settings.truncation!r})"),
        (counts.dropped, f"over {limit}, left out"),
        (counts.split, f"over {limit}, split"),
        (counts.masked, "with no trained token left after the cut, left out"),
        (counts.empty, "with nothing to learn, left out"),
        (counts.prompt_differs, "whose prompt alone, as in generation, splits into other tokens"),
        (counts.special_text, "whose own text spells a special token, which is read as that token"),
        (counts.open_turn, "with an assistant turn that the template ends with no token to stop at"),
        (counts.rewritten, "with an assistant turn that the template rewords (what it writes is trained)"),
        (counts.touching, "whose prompt and completion meet without white space (separator= parts them)"),
    )
    for rows, what in texts:
        if rows:
            yield f"{len(rows)} {'row' if len(rows) == 1 else 'rows'} {what}: {listing(str(row) for row in rows)}"
    if "strftime_now" in source:
        yield "the chat template writes today's date, so the ids change from day to day"
