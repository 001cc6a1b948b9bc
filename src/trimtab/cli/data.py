"""`trimtab data`: what a data file holds and, with a model, which tokens of it would be trained."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trimtab.cli.verb import Verb, columns, heading, say
from trimtab.core.errors import UserError
from trimtab.train.recipe import CHOICES
from trimtab.train.settings import pairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trimtab.data.encoded import Encoded, EncodedSet
    from trimtab.data.examples import Example
    from trimtab.data.mixture import Source

LONGEST = 600
"""Characters of a field or a piece that are shown."""


@click.command(cls=Verb, name="data", short_help="Show what would be trained.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--model", help="A model directory or starter; its tokenizer shows which tokens are trained.")
@click.option("--columns", "roles", metavar="ROLE=COLUMN,...", help="Which column plays which role.")
@click.option("--max-length", type=click.IntRange(min=2), help="Longest row in tokens.")
@click.option(
    "--truncation", type=click.Choice(CHOICES["truncation"]), default="error", help="What longer rows become."
)
@click.option("--train-on", type=click.Choice(CHOICES["train_on"]), default="completions", help="What is trained.")
@click.option("--examples", "shown", type=click.IntRange(min=0), default=2, show_default=True, help="Rows to show.")
def command(
    file: Path,
    model: str | None,
    roles: str | None,
    max_length: int | None,
    truncation: Any,
    train_on: Any,
    shown: int,
) -> dict[str, Any]:
    """Read a data file as `trimtab tune` would: its form, its rows and, with --model, the tokens that are trained.

    A YAML file that lists several is read as their mixture: how many rows of each an epoch has, then each of them.
    """
    from trimtab.data.mixture import apportioned, gather, is_mixture, share_of

    sources = gather(file, mapping(roles))
    tokenizer, found = None if model is None else tokenizer_of(model), list[dict[str, Any]]()
    sizes = [len(one.rows) for one in sources.parts]
    amounts = apportioned(sum(sizes), sources.weights(sizes))
    if is_mixture(file):
        say(heading(str(file)))
        shares = zip(sources.parts, amounts, sizes, strict=True)
        say(columns([(one.name, share_of(share, sum(sizes), size)) for one, share, size in shares]) + "\n")
    for source in sources.parts:
        if found:
            say("")
        found.append(described(source))
        if tokenizer is None:
            found[-1]["examples"] = [plain(row) for row in source.rows[:shown]]
            for one in found[-1]["examples"]:
                say("\n" + columns([(key, short(value)) for key, value in one.items()]))
            continue
        from trimtab.data.examples import Labelled
        from trimtab.models.tasks import decoder_start_of

        start = None if isinstance(source.rows[0], Labelled) else decoder_start_of(str(model))
        found[-1] |= encoded(source.rows, tokenizer, max_length, truncation, train_on, shown, start)
    if tokenizer is None:
        say(f"\nTo see the trained tokens: trimtab data {file} --model smollm2-135m-instruct")
    if not is_mixture(file):
        return found[0]
    mixed = [one | {"rows_per_epoch": amount} for one, amount in zip(found, amounts, strict=True)]
    return {"path": str(file), "sha256": sources.sha256, "sources": mixed}


def described(source: Source) -> dict[str, Any]:
    """What one data set holds, printed and as plain data."""
    table, form, rows = source.table, source.form, source.rows
    found: dict[str, Any] = {
        "path": str(table.path),
        "kind": table.kind,
        "sha256": table.sha256,
        "form": form.name,
        "columns": dict(form.columns),
        "ignored": list(form.ignored),
        "rows": len(rows),
        "prompts": len({row.prompt_key() for row in rows}),
    }
    facts = [
        ("form", f"{form.name} ({', '.join(f'{role}={column}' for role, column in form.columns.items())})"),
        ("rows", f"{len(rows):,}, {found['prompts']:,} different prompts"),
    ]
    if form.ignored:
        facts.append(("not read", ", ".join(form.ignored)))
    if form.target == "classes":
        found["labels"] = {str(label): count for label, count in Counter(row.label for row in rows).items()}  # type: ignore[attr-defined]
        facts.append(("labels", ", ".join(f"{label} {count}" for label, count in sorted(found["labels"].items()))))
    elif form.target:
        facts.append(("target", "a number"))
    say(heading(str(table.path)) + "\n" + columns(facts))
    return found


def mapping(text: str | None) -> dict[str, str] | None:
    """`prompt=a,completion=b` as roles and columns."""
    try:
        return pairs(text) if text else None
    except ValueError as error:
        raise UserError(f"data: --columns {text}: {error}", fix="for example --columns prompt=a,completion=b") from None


def encoded(
    rows: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    truncation: Any,
    train_on: Any,
    shown: int,
    decoder_start: int | None,
) -> dict[str, Any]:
    """Encode rows, print the report and some of them; returns both as plain data."""
    from trimtab.data.encode import encode_all

    limit = max_length or (tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else None)
    settings = {"max_length": limit, "truncation": truncation, "train_on": train_on, "decoder_start": decoder_start}
    made = encode_all(rows, tokenizer, **settings)
    say("\n".join("  " + line for line in made.report.summary().splitlines()))
    checks = checked(made, tokenizer)
    say(columns([(str(one["check"]), str(one["found"])) for one in checks]))
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    if made.report.template != "none" and shown:
        say("\n" + (click.style("trained tokens", fg="green") if colours else "trained tokens stand in [[ ]]"))
    examples = []
    for one in made[:shown]:
        runs = pieces(one, tokenizer)
        label: Any = one.label
        if isinstance(made.labels, tuple) and isinstance(label, int):
            label = str(made.labels[label])
        named = "" if label is None else f", label {label}"
        tokens = len(one.ids) + len(one.source or ())
        examples.append({"row": one.row, "tokens": tokens, "label": label, "pieces": runs})
        say(f"\nrow {one.row}, {tokens} tokens{named}\n{marked(runs, colours)}")
    report = vars(made.report) | {"notes": list(made.report.notes)}
    return {"report": report, "checks": checks, "examples": examples}


def checked(made: EncodedSet, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Whether what ends an answer is learned, and padding is not: read from the masks and from a padded batch."""
    from trimtab.data.batches import IGNORED, collate

    if made.report.template == "none":
        return []
    last = [max((place for place, on in enumerate(row.trained) if on), default=-1) for row in made]
    ends = Counter(row.ids[place] for row, place in zip(made, last, strict=True) if place >= 0)
    token, special = ends.most_common(1)[0][0], set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ended = sum(count for one, count in ends.items() if one in special)
    by_length = sorted(made, key=lambda row: len(row.ids))
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    batch = collate([by_length[0], by_length[-1]], pad_id)
    learned = int((batch["labels"][0, len(by_length[0].ids) :] != IGNORED).sum())
    name = f" ({tokenizer.decode([token])})" if token in special else ""
    end = f"trained in {ended:,} of {len(made):,} sequences{name}"
    if ended < len(made):
        end += "; the others end without one, so a model does not learn there when to stop"
    padding = "not trained" if not learned else f"{learned} positions are trained, which is wrong"
    return [
        {"check": "end of turn", "found": end, "passed": ended == len(made)},
        {"check": "padding", "found": f"{padding} ({tokenizer.decode([pad_id])})", "passed": not learned},
    ]


def pieces(row: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The text of a row as runs of trained and untrained tokens; what an encoder reads stands in front."""
    read = row.source or []
    marks = list(zip([*read, *row.ids], [False] * len(read) + list(row.trained), strict=True))
    return [
        {"text": tokenizer.decode([token for token, _ in run]), "trained": trained}
        for trained, run in groupby(marks, key=lambda mark: mark[1])
    ]


def marked(runs: Sequence[Mapping[str, Any]], colours: bool) -> str:
    """Runs as one text, the trained ones green or in double brackets."""
    parts = []
    for run in runs:
        words = short(run["text"])
        if run["trained"]:
            words = click.style(words, fg="green") if colours else f"[[{words}]]"
        parts.append(words)
    return "".join(parts)


def plain(row: Example) -> dict[str, Any]:
    """An example as plain data."""
    import dataclasses

    return {key: value for key, value in dataclasses.asdict(row).items() if value not in (None, "")}


def short(value: Any) -> str:
    """A value as text, its middle left out when it is long."""
    words = value if isinstance(value, str) else str(value)
    return words if len(words) <= LONGEST else f"{words[: LONGEST // 2]} ... {words[-LONGEST // 2 :]}"


def tokenizer_of(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory, a starter or a hub id; no weights are read."""
    from transformers import AutoTokenizer

    from trimtab.models.files import tokenizer_problems
    from trimtab.models.sources import asked
    from trimtab.models.starters import fetch, quiet_transformers, starters

    directory = Path(model).expanduser()
    source = str(directory) if directory.is_dir() or model not in starters() else str(fetch(model, progress=say))
    problems = tokenizer_problems(directory) if directory.is_dir() else []
    if problems:
        raise UserError(f"data: no tokenizer could be loaded from {model}: {problems[0][0]}", fix=problems[0][1])
    try:
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**asked(source))
    except (OSError, ValueError, KeyError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        fix = f"give a model directory, or a starter: {', '.join(starters())}"
        raise UserError(f"data: no tokenizer could be loaded from {model}: {reason}", fix=fix) from None
    return tokenizer
