"""Labelled texts and pairs as token ids, and their labels as numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trimtab.core.errors import UserError, listing, nearest
from trimtab.data.counting import Counts, Settings, finished, numbered, refuse_over_long
from trimtab.data.encoded import Encoded, EncodedSet, Labels
from trimtab.data.examples import Label, Labelled
from trimtab.data.wording import own_texts, special_pattern

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 256
"""Examples tokenised in one call."""


def encode_labelled(
    examples: Sequence[Labelled], tokenizer: PreTrainedTokenizerBase, settings: Settings, labels: Labels | None
) -> EncodedSet:
    """Texts or pairs of a classifier or regressor, each with the number of its label."""
    labels = labels if labels is not None else labels_of(examples)
    numbers = class_numbers(examples, labels)
    if settings.truncation == "left" and any(example.pair is not None for example in examples):
        raise UserError("truncation='left' is not for pairs of texts", fix="truncation='right' shortens the longer one")
    counts = Counts()
    pattern = special_pattern(tokenizer)
    made: list[Encoded] = []
    for first in range(0, len(examples), CHUNK):
        chunk = examples[first : first + CHUNK]
        batch = paired(chunk, tokenizer, None, "right")
        for place, example in enumerate(chunk):
            row = example.row or first + place + 1
            ids, types = batch[place]
            if pattern is not None and any(pattern.search(text) for text in own_texts(example)):
                counts.special_text.append(row)
            if counts.measure(row, len(ids), settings.max_length):
                if settings.truncation == "error":
                    continue
                if settings.truncation == "drop":
                    counts.dropped.append(row)
                    continue
                ids, types = paired([example], tokenizer, settings.max_length, settings.truncation)[0]
                counts.truncated.append(row)
            made.append(Encoded(ids, [False] * len(ids), numbers[first + place], types, row))
    refuse_over_long(counts, len(examples), settings, False)
    return finished(examples, made, labels, counts, settings, None, tokenizer, len(made))


def paired(
    examples: Sequence[Labelled], tokenizer: PreTrainedTokenizerBase, max_length: int | None, side: str
) -> list[tuple[list[int], list[int] | None]]:
    """Ids and segment ids of texts or pairs with the tokenizer's special tokens."""
    if len({example.pair is None for example in examples}) > 1:
        return [made for example in examples for made in paired([example], tokenizer, max_length, side)]
    pairs = [example.pair for example in examples] if examples[0].pair is not None else None
    before = tokenizer.truncation_side
    tokenizer.truncation_side = side
    try:
        batch = tokenizer(
            [example.text for example in examples],
            pairs,
            truncation=max_length is not None,
            max_length=max_length,
            return_attention_mask=False,
            verbose=False,
        )
    finally:
        tokenizer.truncation_side = before
    types = batch.get("token_type_ids") or [None] * len(examples)
    return list(zip(batch["input_ids"], types, strict=True))


def labels_of(examples: Sequence[Labelled]) -> Labels:
    """The classes of a training set, in the order of their numbers: whole numbers, then strings; or regression."""
    found = {example.label for example in examples}
    floats = sum(isinstance(label, float) for label in found)
    if floats == len(found):
        return "regression"
    if floats:
        raise UserError(
            "encode: some labels are numbers with a point and some are not", fix="write them all the same way"
        )

    def order(label: Label) -> tuple[bool, int, str]:
        whole = re.fullmatch(r"[+-]?\d+", str(label))
        return not whole, int(str(label)) if whole else 0, str(label)

    return tuple(sorted(found, key=order))


def class_numbers(examples: Sequence[Labelled], labels: Labels) -> list[int | float]:
    """Each example's class number, or its label itself; classes are compared as written, so 1 is `"1"`."""
    problems = []
    numbers: list[int | float] = []
    places = {str(label): place for place, label in enumerate(labels)} if labels != "regression" else {}
    for row, example in numbered(examples):
        label = example.label if isinstance(example, Labelled) else ""
        if labels == "regression":
            if isinstance(label, str | bool):
                problems.append(f"row {row}: {label!r} is not a number")
            else:
                numbers.append(float(label))
        elif str(label) in places:
            numbers.append(places[str(label)])
        else:
            near = nearest(str(label), places, 1)
            problems.append(f"row {row}: {label!r}" + (f" (nearest: {near[0]})" if near else ""))
    if problems:
        known = "numbers" if labels == "regression" else listing(str(label) for label in labels)
        shown = "\n  ".join(problems[:10]) + (f"\n  (+{len(problems) - 10} more)" if len(problems) > 10 else "")
        raise UserError(
            f"{len(problems)} of {len(examples)} rows have a label that training did not have ({known}):\n  {shown}",
            fix="mend the labels, or fix the classes with labels=",
        )
    return numbers
