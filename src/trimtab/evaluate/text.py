"""Scores of answers against references: exact match, token F1, and JSON records field by field."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
FENCE = re.compile(r"\s*```[a-z]*\n(.*?)\n?```\s*", re.DOTALL)


def normalised(text: str) -> str:
    """As SQuAD compares answers: lower case, no ASCII punctuation, no English articles, single spaces.

    >>> normalised("The  Cat's  hat!")
    'cats hat'
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(predictions: Sequence[str], references: Sequence[str], *, strict: bool = False) -> float:
    """The share of answers equal to their reference once both are `normalised`; `strict` only strips white space.

    >>> exact_match(["The cat", "a dog"], ["cat", "dogs"])
    0.5
    """
    pairs = paired(predictions, references)
    plain = str.strip if strict else normalised
    return sum(plain(prediction) == plain(reference) for prediction, reference in pairs) / len(pairs)


def token_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The mean over rows of the F1 of shared words, after `normalised`, as SQuAD computes it.

    F1 = 2·P·R / (P + R), where P and R are the shares of the answer's and of the reference's words that both have, each
    counted as often as it occurs. Where either has no words, F1 is 1 if both have none, else 0.

    >>> token_f1(["the black cat"], ["a black dog"])
    0.5
    """
    pairs = paired(predictions, references)
    return sum(_f1(normalised(one).split(), normalised(other).split()) for one, other in pairs) / len(pairs)


def _f1(predicted: list[str], reference: list[str]) -> float:
    if not predicted or not reference:
        return float(predicted == reference)
    shared = sum((Counter(predicted) & Counter(reference)).values())
    return 2 * shared / (len(predicted) + len(reference))


@dataclass(frozen=True)
class RecordScores:
    """How well answers that should be JSON objects agree with the wanted ones; shares between 0 and 1."""

    rows: int
    valid: float
    """Answers that are one JSON object and nothing else, but for white space and a code fence around it."""
    exact: float
    """Valid answers equal to the wanted record: same fields, same values and types; the order of fields is free."""
    fields: Mapping[str, float]
    """F1 of each field. A value counts when it equals the wanted one; null counts as no value."""

    @property
    def f1(self) -> float:
        """The mean of the fields' F1."""
        return sum(self.fields.values()) / len(self.fields) if self.fields else 0.0

    def document(self) -> dict[str, Any]:
        """Plain data."""
        return {"rows": self.rows, "valid": self.valid, "exact": self.exact, "f1": self.f1, "fields": {**self.fields}}


def record_scores(predictions: Sequence[str], references: Sequence[str]) -> RecordScores:
    """Score answers against references that are JSON objects.

    Per field, over all rows: precision is right values / values given, recall right values / values wanted. Values are
    looked for in the first JSON object of an answer, so that words around it cost `valid` and `exact` but no field.
    A field that no reference has lowers no score but `exact`. A reference that is no JSON object is a `ValueError`.
    """
    valid = exact = 0
    right: Counter[str] = Counter()
    given: Counter[str] = Counter()
    wanted: Counter[str] = Counter()
    names: dict[str, None] = {}
    for number, (prediction, reference) in enumerate(paired(predictions, references), 1):
        target = whole_object(reference)
        if target is None:
            raise ValueError(f"record_scores: reference {number} is no JSON object: {reference[:60]!r}")
        found = whole_object(prediction)
        valid += found is not None
        exact += found is not None and same(found, target)
        answer = found if found is not None else first_object(prediction)
        names |= dict.fromkeys(target)
        wanted.update(name for name, value in target.items() if value is not None)
        given.update(name for name, value in answer.items() if value is not None)
        right.update(
            name for name, value in target.items() if value is not None and name in answer and same(answer[name], value)
        )
    rows = len(predictions)
    scores = {name: 2 * right[name] / (given[name] + wanted[name]) for name in names if given[name] + wanted[name]}
    return RecordScores(rows, valid / rows, exact / rows, scores)


def whole_object(text: str) -> dict[str, Any] | None:
    """The JSON object a text is, white space and one code fence around it apart, or None."""
    fenced = FENCE.fullmatch(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def first_object(text: str) -> dict[str, Any]:
    """The first JSON object anywhere in a text; empty where there is none."""
    for brace in re.finditer(r"\{", text):
        try:
            value, _ = json.JSONDecoder().raw_decode(text, brace.start())
        except (ValueError, RecursionError):
            continue
        return value
    return {}


def same(one: Any, other: Any) -> bool:
    """Equality of JSON values in which true is not 1; 1 and 1.0 are one number."""
    return json.dumps(_plain(one), sort_keys=True) == json.dumps(_plain(other), sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def paired(predictions: Sequence[str], references: Sequence[str]) -> list[tuple[str, str]]:
    """Answers beside their references; as many of the one as of the other, and at least one."""
    if len(predictions) != len(references) or not references:
        raise ValueError(f"{len(predictions)} answers and {len(references)} references cannot be compared")
    return list(zip(predictions, references, strict=True))
