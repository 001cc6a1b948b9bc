"""The forms a data file can have, told from its columns alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trimtab.core.errors import UserError, listing, nearest
from trimtab.data.examples import Example
from trimtab.data.reading import Table
from trimtab.data.rows import Form, Odd, example_of, keys_of, target_of


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
            example_of(table, form, index)
        except Odd as odd:
            problems.append(f"{table.where(index)}: {odd}{_other_form(table, form, index)}")
    if not problems and form.name == "labelled":
        target, problems = target_of(table, chosen["label"])
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
            made.append(example_of(table, form, index))
        except Odd as odd:
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


def _found(table: Table) -> tuple[_Shape, dict[str, str]]:
    """The one shape that fits the columns most rows have."""
    counts = Counter(frozenset(keys_of(row)) for row in table.rows)
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
        fits = _fitting(keys_of(row))
    except _Ambiguous:
        return ""
    if len(fits) != 1:
        return ""
    shape, chosen = fits[0]
    name = shape.name
    if name == _CHAT:
        name = _turns(Table([row], table.path, table.kind, "", table.columns), chosen["messages"])
    return f"; the row looks like {name}: one file must have one form" if name != form.name else ""
