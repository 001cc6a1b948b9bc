"""The rows of a file whose form is known, as examples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from trimtab.core.errors import listing, nearest
from trimtab.data.examples import Conversation, Example, Label, Labelled, Message, PromptCompletion, Text
from trimtab.data.reading import Table


@dataclass(frozen=True)
class Form:
    """What `detect` found: the form's name, which column plays which role, and the columns nobody reads."""

    name: str
    """alpaca, sharegpt, messages, prompt-completion, labelled or text."""
    columns: Mapping[str, str]
    """Role (prompt, completion, text, ...) to column name."""
    ignored: tuple[str, ...] = ()
    target: Literal["classes", "regression"] | None = None
    """Of a labelled form only."""


ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""Names of speakers in data files to the four roles."""


class Odd(Exception):
    """A row that does not fit the form."""


def example_of(table: Table, form: Form, index: int) -> Example:
    """The example of one row, which may be odd."""
    row, columns, number = table.rows[index], form.columns, index + 1
    system = _optional(row, columns.get("system"))
    if form.name == "text":
        text = _string(row, columns["text"])
        _need(text, f"no text: {columns['text']!r} is blank")
        return Text(text, row=number)
    if form.name == "labelled":
        text = _string(row, columns["text"])
        pair = _string(row, columns["pair"]) if "pair" in columns else None
        _need(text, f"no text: {columns['text']!r} is blank")
        if pair is not None:
            _need(pair, f"no text: {columns['pair']!r} is blank")
        label = label_in(row, columns["label"])
        return Labelled(text, pair, float(label) if form.target == "regression" else label, row=number)
    if form.name == "prompt-completion":
        prompt, completion = _string(row, columns["prompt"]), _string(row, columns["completion"])
        _need(prompt, f"neither prompt nor text: {columns['prompt']!r} is blank")
        return PromptCompletion(prompt, completion, system, row=number)
    if form.name == "alpaca":
        instruction, output = _string(row, columns["instruction"]), _string(row, columns["output"])
        extra = _optional(row, columns.get("input"))
        user = "\n\n".join(part for part in (instruction, extra) if part.strip())
        _need(user, f"neither prompt nor text: {columns['instruction']!r} is blank")
        turns = [Message("system", system)] if system.strip() else []
        return Conversation((*turns, Message("user", user), Message("assistant", output)), row=number)
    messages = messages_of(row, columns["messages"], form.name == "sharegpt")
    if system.strip() and messages[0].role != "system":
        messages.insert(0, Message("system", system))
    return Conversation(tuple(messages), row=number)


def target_of(table: Table, column: str) -> tuple[Literal["classes", "regression"], list[str]]:
    """Classes or regression, for a whole column of labels, and the rows whose kind of label differs."""
    textual = table.kind in ("csv", "tsv")
    labels = [label_in(row, column) for row in table.rows]
    kinds = [label_kind(label, textual) for label in labels]
    if "number" in kinds:
        kinds = ["number" if kind == "whole number" else kind for kind in kinds]
    counts = Counter(kinds)
    usual = counts.most_common(1)[0][0]
    if len(counts) > 1 and not (textual and usual != "number"):
        odd = [
            f"{table.where(index)}: the label {label!r} is a {kind}, the others are {usual}s"
            for index, (label, kind) in enumerate(zip(labels, kinds, strict=True))
            if kind != usual
        ]
        return "classes", odd
    return ("regression" if usual == "number" else "classes"), []


def messages_of(row: Mapping[str, object], column: str, sharegpt: bool) -> list[Message]:
    """The turns in a column, each of a known speaker."""
    turns = row.get(column)
    if turns is None:
        raise Odd(f"{column!r} is null") if column in row else _missing(row, column)
    if not isinstance(turns, list):
        raise Odd(f"{column!r} is {kind_of_value(turns)}, expected a list of turns")
    if not turns:
        raise Odd(f"neither prompt nor text: {column!r} has no turns")
    speaker, words = ("from", "value") if sharegpt else ("role", "content")
    messages = [message_of(turn, number, speaker, words) for number, turn in enumerate(turns, start=1)]
    if not any(message.role == "assistant" for message in messages):
        raise Odd(f"{column!r} has no assistant turn to learn")
    return messages


def message_of(turn: object, number: int, speaker: str, words: str) -> Message:
    """One turn, by what its form calls speaker and words."""
    if not isinstance(turn, Mapping):
        raise Odd(f"turn {number} is {kind_of_value(turn)}, expected an object with {speaker} and {words}")
    if turn.get(speaker) is None:
        other = {"from", "value"} if speaker == "role" else {"role", "content"}
        mixed = "; the turn looks like the other chat form: one file must have one form" if other <= set(turn) else ""
        raise Odd(f"turn {number} misses {speaker!r}; it has {listing(keys_of(turn)) or 'nothing'}{mixed}")
    name = text_of(turn[speaker], speaker)
    if name.lower() not in ROLES:
        near = nearest(name, ROLES, 1)
        raise Odd(
            f"turn {number} has the unknown {speaker} {name!r}; known: {listing(ROLES, 20)}"
            + (f"; nearest: {near[0]}" if near else "")
        )
    for key in ("tool_calls", "function_call"):
        if turn.get(key):
            raise Odd(f"turn {number} has {key!r}, which cannot be rendered yet: write the call into {words!r}")
    content = turn.get(words)
    if content is None:
        raise Odd(f"turn {number} misses {words!r}; it has {listing(keys_of(turn)) or 'nothing'}")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise Odd(f"turn {number} has content that is not text (an image or audio?)")
        content = "".join(str(part) for part in parts)
    weight = turn.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise Odd(f"turn {number} has weight {weight!r}, expected 0 or 1")
    return Message(ROLES[name.lower()], text_of(content, words), trained=weight != 0)


def label_in(row: Mapping[str, object], column: str) -> Label:
    """The label in a column: a string, a boolean or a finite number."""
    value = row.get(column)
    if value is None:
        raise Odd(f"{column!r} is null") if column in row else _missing(row, column)
    if not isinstance(value, str | int | float):
        raise Odd(f"{column!r} is {kind_of_value(value)}, expected a string, a number or a boolean")
    if isinstance(value, str):
        _need(value, f"{column!r} is blank")
        return text_of(value, column)
    if isinstance(value, float) and not math.isfinite(value):
        raise Odd(f"{column!r} is {value}, expected a finite number")
    return value


def label_kind(label: Label, textual: bool) -> str:
    """`string`, `boolean`, `whole number` or `number`; a csv field is the number it reads as."""
    if isinstance(label, bool):
        return "boolean"
    if isinstance(label, str):
        if not textual or "_" in label:
            return "string"
        try:
            label = float(label) if any(mark in label for mark in ".eE") else int(label)
        except ValueError:
            return "string"
        if not math.isfinite(label):
            return "string"
    return "whole number" if isinstance(label, int) else "number"


def text_of(value: object, what: str) -> str:
    """A value that must be text which can be written as UTF-8."""
    if not isinstance(value, str):
        raise Odd(f"{what!r} is {kind_of_value(value)}, expected text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise Odd(f"{what!r} holds half a character (a lone surrogate) at position {error.start}") from error
    return value


def _string(row: Mapping[str, object], column: str) -> str:
    """The text in a column, which must be there."""
    value = row.get(column)
    if value is None:
        if column in row:
            raise Odd(f"{column!r} is null")
        raise _missing(row, column)
    return text_of(value, column)


def _optional(row: Mapping[str, object], column: str | None) -> str:
    """The text in an optional column; empty when it is absent or null."""
    if column is None or row.get(column) is None:
        return ""
    return _string(row, column)


def _need(text: str, what: str) -> None:
    if not text.strip():
        raise Odd(what)


def _missing(row: Mapping[str, object], column: str) -> Odd:
    near = nearest(column, [key for key in row if key != column], 1)
    return Odd(
        f"misses {column!r}; it has {listing(keys_of(row)) or 'nothing'}" + (f"; nearest: {near[0]}" if near else "")
    )


def keys_of(row: Mapping[str, object]) -> tuple[str, ...]:
    """The columns in which a row has something."""
    return tuple(key for key, value in row.items() if value is not None)


def kind_of_value(value: object) -> str:
    """A value in an error: its kind, and a number itself."""
    names: dict[type, str] = {str: "text", list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value)) or f"the {type(value).__name__} {str(value)[:40]}"
