"""The forms a data file can have, told from its columns alone, and the examples made of its rows."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from trimtab.core.errors import UserError, listing, nearest
from trimtab.data.reading import Table

Label = str | int | bool | float


@dataclass(frozen=True)
class Message:
    """One turn: `role` is system, user, assistant or tool; an assistant turn with `trained=False` is only read."""

    role: str
    content: str
    trained: bool = True


@dataclass(frozen=True, kw_only=True)
class Example:
    """One example; the abstract base of the four kinds. Equal content makes equal examples, whatever their rows."""

    row: int = field(default=0, compare=False)
    """Its row in the file, from 1; 0 when it came from no file."""

    def prompt_key(self) -> tuple[str, ...]:
        """What the model is asked, white space normalised: examples with equal keys stay on one side of a split."""
        raise NotImplementedError


@dataclass(frozen=True)
class Conversation(Example):
    """A chat; what follows the last assistant turn is not trained on."""

    messages: tuple[Message, ...]

    def prompt_key(self) -> tuple[str, ...]:
        """The user's words before the first answer to them; the system prompt does not tell prompts apart."""
        asked: list[str] = []
        for message in self.messages:
            if message.role == "assistant" and asked:
                break
            if message.role not in ("system", "assistant"):
                asked.append(_squeeze(message.content))
        return tuple(asked) or tuple(_squeeze(message.content) for message in self.messages)


@dataclass(frozen=True)
class PromptCompletion(Example):
    """A prompt and the completion to be learned, with an optional system prompt."""

    prompt: str
    completion: str
    system: str = ""

    def prompt_key(self) -> tuple[str, ...]:
        """The prompt; the system prompt does not tell prompts apart."""
        return (_squeeze(self.prompt),)


@dataclass(frozen=True)
class Text(Example):
    """Plain text for language modelling."""

    text: str

    def prompt_key(self) -> tuple[str, ...]:
        """The whole text."""
        return (_squeeze(self.text),)


@dataclass(frozen=True)
class Labelled(Example):
    """One text, or a pair of them, with a class label (str, int, bool) or a number to regress to (float)."""

    text: str
    pair: str | None
    label: Label

    def prompt_key(self) -> tuple[str, ...]:
        """The text or the pair."""
        return (_squeeze(self.text),) if self.pair is None else (_squeeze(self.text), _squeeze(self.pair))


def _squeeze(text: str) -> str:
    return " ".join(text.split())


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


@dataclass(frozen=True)
class _Shape:
    """A form before it met a table: required and optional roles, and the column names each goes by."""

    name: str
    required: Mapping[str, tuple[str, ...]]
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    yields_to: tuple[str, ...] = ()
    """Shapes that read more of the same columns, so win when both fit."""

    @property
    def roles(self) -> tuple[str, ...]:
        return (*self.required, *self.optional)


_SYSTEM = ("system", "system_prompt")
_CHAT = "chat"

SHAPES = (
    _Shape(
        "alpaca",
        {"instruction": ("instruction",), "output": ("output", "response")},
        {"input": ("input", "context"), "system": _SYSTEM},
    ),
    _Shape(_CHAT, {"messages": ("messages", "conversations", "conversation", "chat")}, {"system": _SYSTEM}),
    _Shape("labelled", {"text": ("text", "sentence"), "label": ("label", "labels")}, {"pair": ()}),
    _Shape(
        "prompt-completion",
        {
            "prompt": ("prompt", "question", "input", "query", "context"),
            "completion": ("completion", "answer", "output", "response", "continuation"),
        },
        {"system": _SYSTEM},
        yields_to=("alpaca",),
    ),
    _Shape("text", {"text": ("text", "document")}, yields_to=("alpaca", _CHAT, "labelled", "prompt-completion")),
)

PAIRS = (
    ("sentence1", "sentence2"),
    ("text_a", "text_b"),
    ("text1", "text2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("text", "pair"),
)
"""Column names of a labelled pair of texts."""

PAIR_LABELS = ("label", "labels", "score")

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


class _Ambiguous(Exception):
    """Several columns could play one role."""


def detect(table: Table, columns: Mapping[str, str] | None = None) -> Form:
    """Tell the form of a table from its column names (case ignored), and check every row against it.

    `columns` maps roles to column names, e.g. `{"prompt": "mr", "completion": "ref"}`, and then says everything: no
    other column is read. The roles given choose the form: `instruction`+`output` (`input`, `system`) alpaca; `messages`
    (`system`) a chat; `prompt`+`completion` (`system`); `text`+`label` (`pair`) labelled; `text` alone plain text.

    Without `columns`, the form is that of most rows, and the others are errors. A form that reads more columns wins
    over one that reads some of them (alpaca, then prompt-completion, then text); two that compete are an error.

    Labels: strings, booleans and whole numbers are classes; numbers of which one at least has a point are regression
    targets. In csv and tsv, where everything is text, classes are strings, and regression needs every label to read as
    a number and one at least to have a point.

    Raises `UserError` with all problems found: no or several forms fit, a column is wrong, or rows differ.
    """
    shape, chosen = _given(table, columns) if columns is not None else _found(table)
    read = set(chosen.values())
    ignored = tuple(column for column in table.columns if column not in read)
    name = _turns(table, chosen["messages"]) if shape.name == _CHAT else shape.name
    form = Form(name, chosen, ignored)
    if columns is None:
        _refuse_preferences(table, form)
    problems: list[str] = []
    for index in range(len(table)):
        try:
            _example(table, form, index)
        except _Odd as odd:
            problems.append(f"{table.where(index)}: {odd}{_other_form(table, form, index)}")
    if not problems and form.name == "labelled":
        target, problems = _target(table, chosen["label"])
        form = Form(form.name, chosen, ignored, target)
    if problems:
        count = f"{len(problems)} of {len(table)} rows do not fit" if len(problems) > 1 else "a row does not fit"
        shown = "\n  ".join(problems[:10]) + (f"\n  (+{len(problems) - 10} more)" if len(problems) > 10 else "")
        what = ", ".join(f"{role}={column}" for role, column in chosen.items())
        raise UserError(
            f"{table.path}: {count} the form {form.name} ({what}):\n  {shown}", fix="mend or remove the rows"
        )
    return form


def examples(table: Table, form: Form) -> list[Example]:
    """The examples of a table's rows, in order; the table must be one that `detect` accepted for this form."""
    made = []
    for index in range(len(table)):
        try:
            made.append(_example(table, form, index))
        except _Odd as odd:
            raise UserError(
                f"{table.path}: {table.where(index)} does not fit the form {form.name}: {odd}",
                fix="detect the form on this table",
            ) from odd
    return made


def _given(table: Table, columns: Mapping[str, str]) -> tuple[_Shape, dict[str, str]]:
    """The shape whose roles the user named."""
    problems, fix = [], None
    known = list(dict.fromkeys(role for shape in SHAPES for role in shape.roles))
    chosen: dict[str, str] = {}
    for role, column in columns.items():
        if role not in known:
            near = nearest(role, known, 1)
            problems.append(
                f"no role {role!r}; roles: {listing(known, 20)}" + (f"; nearest: {near[0]}" if near else "")
            )
            continue
        match = _column(table.columns, column)
        if match is None:
            near = nearest(column, table.columns, 1)
            problems.append(
                f"no column {column!r} for {role}; the file has {listing(table.columns, 20)}"
                + (f"; nearest: {near[0]}" if near else "")
            )
            fix = fix or (f"columns={{{role!r}: {near[0]!r}, ...}}" if near else None)
        elif match in chosen.values():
            problems.append(f"column {match!r} is named for two roles")
        else:
            chosen[role] = match
    if not problems:
        for shape in sorted(SHAPES, key=lambda shape: len(shape.required)):
            if set(shape.required) <= set(chosen) <= set(shape.roles):
                return shape, chosen
        allowed = "; ".join(
            f"{shape.name}: "
            + " + ".join(shape.required)
            + (f" ({', '.join(shape.optional)})" if shape.optional else "")
            for shape in SHAPES
        )
        problems.append(f"columns= names {listing(chosen) or 'no role'}, which is no form; forms: {allowed}")
        fix = "name the roles of one form"
    raise UserError(f"{table.path}: " + "\n  ".join(problems), fix=fix or "name roles and columns that exist")


def _column(columns: Sequence[str], wanted: str) -> str | None:
    """The column called so: exactly, or but for the case when only one is."""
    if wanted in columns:
        return wanted
    same = [column for column in columns if column.lower() == wanted.lower()]
    return same[0] if len(same) == 1 else None


def _match(shape: _Shape, columns: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Which columns play the shape's required roles, and the roles nobody plays."""
    if shape.name == "labelled":
        for first, second in PAIRS:
            one, two = _column(columns, first), _column(columns, second)
            label = next((found for name in PAIR_LABELS if (found := _column(columns, name))), None)
            if one and two and label:
                return {"text": one, "pair": two, "label": label}, []
    chosen: dict[str, str] = {}
    missing = []
    canonical = all(_column(columns, role) for role in shape.required)
    for role, aliases in shape.required.items():
        names = (role,) if canonical else aliases
        matches = [found for name in names if (found := _column(columns, name))]
        if len(matches) > 1:
            raise _Ambiguous(f"{shape.name}: {' and '.join(matches)} could each be the {role}")
        if matches:
            chosen[role] = matches[0]
        else:
            missing.append(role)
    return chosen, missing


def _fitting(columns: Sequence[str]) -> list[tuple[_Shape, dict[str, str]]]:
    """The shapes these columns fit, without those that yield to another one that fits."""
    fits = []
    clashes = []
    for shape in SHAPES:
        try:
            chosen, missing = _match(shape, columns)
        except _Ambiguous as clash:
            clashes.append((shape, str(clash)))
            continue
        if not missing:
            fits.append((shape, chosen))
    names = {shape.name for shape, _ in fits}
    for shape, reason in clashes:
        if not names & set(shape.yields_to):
            raise _Ambiguous(reason)
    return [(shape, chosen) for shape, chosen in fits if not names & set(shape.yields_to)]


def _keys(row: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(key for key, value in row.items() if value is not None)


def _found(table: Table) -> tuple[_Shape, dict[str, str]]:
    """The one shape that fits the columns most rows have."""
    counts = Counter(frozenset(_keys(row)) for row in table.rows)
    usual = [column for column in table.columns if column in counts.most_common(1)[0][0]]
    mapping = 'name the columns, e.g. columns={"prompt": "...", "completion": "..."}'
    try:
        fits = _fitting(usual) or _fitting(table.columns)
    except _Ambiguous as clash:
        raise UserError(f"{table.path}: {clash}; columns: {listing(table.columns, 20)}", fix=mapping) from clash
    if len(fits) > 1:
        several = " and ".join(
            f"{shape.name} ({', '.join(f'{role}={column}' for role, column in chosen.items())})"
            for shape, chosen in fits
        )
        raise UserError(f"{table.path}: several forms fit the columns: {several}", fix=mapping)
    if not fits:
        raise _no_form(table)
    shape, chosen = fits[0]
    for role, aliases in shape.optional.items():
        if role in chosen:
            continue
        matches = [
            found for name in aliases if (found := _column(table.columns, name)) and found not in chosen.values()
        ]
        if len(matches) > 1:
            raise UserError(f"{table.path}: {' and '.join(matches)} could each be the {role}", fix=mapping)
        if matches:
            chosen[role] = matches[0]
    return shape, chosen


def _no_form(table: Table) -> UserError:
    """The error that lists every form, what each misses and the nearest column."""
    lines = []
    for shape in SHAPES:
        try:
            chosen, missing = _match(shape, table.columns)
        except _Ambiguous:
            continue
        parts = []
        for role in missing:
            aliases = shape.required[role]
            near = list(dict.fromkeys(hit for alias in aliases for hit in nearest(alias, table.columns, 1)))
            near = [column for column in near if column not in chosen.values()]
            parts.append(f"{role} (a column {' or '.join(aliases)}{'; nearest: ' + near[0] if near else ''})")
        has = f"has {', '.join(f'{role}={column}' for role, column in chosen.items())}; " if chosen else ""
        lines.append(f"{shape.name}: {has}misses {' and '.join(parts)}")
    pair = [
        column
        for column in table.columns
        if column.lower() not in ("id", "idx", "index")
        and all(isinstance(row.get(column), str) for row in table.rows[:100])
    ]
    if len(pair) == 2:
        fix = f'columns={{"prompt": {pair[0]!r}, "completion": {pair[1]!r}}}'.replace("'", '"')
        fix += f", on the command line --columns prompt={pair[0]},completion={pair[1]}"
    else:
        fix = 'name the columns, e.g. columns={"prompt": "...", "completion": "..."}'
        fix += ", on the command line --columns prompt=...,completion=..."
    if table.kind in ("csv", "tsv"):
        fix += "; if the first line is data already, read with header=False"
    if {"chosen", "rejected"} & set(table.columns):
        lines.append("chosen and rejected: preference data has no form here; name one as the completion to learn it")
    found = listing(table.columns, 20)
    return UserError(f"{table.path}: no form fits the columns {found}\n  " + "\n  ".join(lines), fix=fix)


def _turns(table: Table, column: str) -> str:
    """`sharegpt` or `messages`: by the keys of the first turn that has any."""
    for row in table.rows:
        turns = row.get(column)
        if isinstance(turns, list):
            for turn in turns:
                if isinstance(turn, Mapping) and turn.get("from") is not None and "value" in turn:
                    return "sharegpt"
                if isinstance(turn, Mapping) and turn.get("role") is not None:
                    return "messages"
    return "messages"


def _refuse_preferences(table: Table, form: Form) -> None:
    """Good and bad answers in one file, told apart by a column nobody reads, are not to be trained on alike."""
    if form.name == "labelled":
        return
    roles = ", ".join(f'"{role}": "{name}"' for role, name in form.columns.items())
    anyway = f"columns={{{roles}}} trains on every row and leaves the mark unread"
    for column in form.ignored:
        if column.lower() in ("label", "labels") and all(isinstance(row.get(column), bool) for row in table.rows):
            raise UserError(
                f"{table.path}: the boolean column {column!r} beside a {form.name} form marks wanted and unwanted "
                "answers; training would learn both",
                fix=f"keep only the wanted rows, or: {anyway}",
            )
    if "messages" in form.columns and {"chosen", "rejected"} <= set(form.ignored):
        raise UserError(
            f"{table.path}: the answers are in the columns 'chosen' and 'rejected'; preference data has no form here",
            fix=f"append the chosen answer to {form.columns['messages']!r}, or: {anyway}",
        )


def _other_form(table: Table, form: Form, index: int) -> str:
    """`; the row looks like ...` when the row fits another form by its own keys."""
    row = table.rows[index]
    try:
        fits = _fitting(_keys(row))
    except _Ambiguous:
        return ""
    if len(fits) != 1:
        return ""
    shape, chosen = fits[0]
    name = shape.name
    if name == _CHAT:
        name = _turns(Table([row], table.path, table.kind, "", table.columns), chosen["messages"])
    return f"; the row looks like {name}: one file must have one form" if name != form.name else ""


class _Odd(Exception):
    """A row that does not fit the form."""


def _kind(value: object) -> str:
    """A value in an error: its kind, and a number itself."""
    names: dict[type, str] = {str: "text", list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value)) or f"the {type(value).__name__} {str(value)[:40]}"


def _missing(row: Mapping[str, object], column: str) -> _Odd:
    near = nearest(column, [key for key in row if key != column], 1)
    return _Odd(
        f"misses {column!r}; it has {listing(_keys(row)) or 'nothing'}" + (f"; nearest: {near[0]}" if near else "")
    )


def _string(row: Mapping[str, object], column: str) -> str:
    """The text in a column, which must be there."""
    value = row.get(column)
    if value is None:
        if column in row:
            raise _Odd(f"{column!r} is null")
        raise _missing(row, column)
    return _text(value, column)


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise _Odd(f"{what!r} is {_kind(value)}, expected text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _Odd(f"{what!r} holds half a character (a lone surrogate) at position {error.start}") from error
    return value


def _optional(row: Mapping[str, object], column: str | None) -> str:
    """The text in an optional column; empty when it is absent or null."""
    if column is None or row.get(column) is None:
        return ""
    return _string(row, column)


def _example(table: Table, form: Form, index: int) -> Example:
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
        label = _label(row, columns["label"])
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
    messages = _messages(row, columns["messages"], form.name == "sharegpt")
    if system.strip() and messages[0].role != "system":
        messages.insert(0, Message("system", system))
    return Conversation(tuple(messages), row=number)


def _need(text: str, what: str) -> None:
    if not text.strip():
        raise _Odd(what)


def _messages(row: Mapping[str, object], column: str, sharegpt: bool) -> list[Message]:
    turns = row.get(column)
    if turns is None:
        raise _Odd(f"{column!r} is null") if column in row else _missing(row, column)
    if not isinstance(turns, list):
        raise _Odd(f"{column!r} is {_kind(turns)}, expected a list of turns")
    if not turns:
        raise _Odd(f"neither prompt nor text: {column!r} has no turns")
    speaker, words = ("from", "value") if sharegpt else ("role", "content")
    messages = [_message(turn, number, speaker, words) for number, turn in enumerate(turns, start=1)]
    if not any(message.role == "assistant" for message in messages):
        raise _Odd(f"{column!r} has no assistant turn to learn")
    return messages


def _message(turn: object, number: int, speaker: str, words: str) -> Message:
    if not isinstance(turn, Mapping):
        raise _Odd(f"turn {number} is {_kind(turn)}, expected an object with {speaker} and {words}")
    if turn.get(speaker) is None:
        other = {"from", "value"} if speaker == "role" else {"role", "content"}
        mixed = "; the turn looks like the other chat form: one file must have one form" if other <= set(turn) else ""
        raise _Odd(f"turn {number} misses {speaker!r}; it has {listing(_keys(turn)) or 'nothing'}{mixed}")
    name = _text(turn[speaker], speaker)
    if name.lower() not in ROLES:
        near = nearest(name, ROLES, 1)
        raise _Odd(
            f"turn {number} has the unknown {speaker} {name!r}; known: {listing(ROLES, 20)}"
            + (f"; nearest: {near[0]}" if near else "")
        )
    for key in ("tool_calls", "function_call"):
        if turn.get(key):
            raise _Odd(f"turn {number} has {key!r}, which cannot be rendered yet: write the call into {words!r}")
    content = turn.get(words)
    if content is None:
        raise _Odd(f"turn {number} misses {words!r}; it has {listing(_keys(turn)) or 'nothing'}")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise _Odd(f"turn {number} has content that is not text (an image or audio?)")
        content = "".join(str(part) for part in parts)
    weight = turn.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise _Odd(f"turn {number} has weight {weight!r}, expected 0 or 1")
    return Message(ROLES[name.lower()], _text(content, words), trained=weight != 0)


def _label(row: Mapping[str, object], column: str) -> Label:
    value = row.get(column)
    if value is None:
        raise _Odd(f"{column!r} is null") if column in row else _missing(row, column)
    if not isinstance(value, str | int | float):
        raise _Odd(f"{column!r} is {_kind(value)}, expected a string, a number or a boolean")
    if isinstance(value, str):
        _need(value, f"{column!r} is blank")
        return _text(value, column)
    if isinstance(value, float) and not math.isfinite(value):
        raise _Odd(f"{column!r} is {value}, expected a finite number")
    return value


def _label_kind(label: Label, textual: bool) -> str:
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


def _target(table: Table, column: str) -> tuple[Literal["classes", "regression"], list[str]]:
    """Classes or regression, for a whole column of labels, and the rows whose kind of label differs."""
    textual = table.kind in ("csv", "tsv")
    labels = [_label(row, column) for row in table.rows]
    kinds = [_label_kind(label, textual) for label in labels]
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
