"""`trimtab methods`: what can be trained, each with its paper, its cost and its settings, and its size on a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import click

from trimtab.cli.verb import Verb, columns, figure, heading, say, size
from trimtab.core.errors import UserError, listing

TITLES = {
    "presets": "presets",
    "start": "starts of LoRA's factors",
    "storage": "storage formats, for --quantize",
    "optim": "optimizers and their parts, for --optimizer",
    "active": "schedules of what trains, for --active",
}
FLAGS = {
    "storage": "--method lora --quantize",
    "optim": "--method full --optimizer",
    "active": "--method full --active",
}
SHOWN_APART = ("name", "class", "kind", "settings", "laws", "equation", "summary", "parts", "start", "on_model", "text")
WORDS = {
    "paper": "arXiv",
    "where": "default sites",
    "hosts": "kinds of site",
    "mergeable": "merges",
    "merges_into_codes": "exactly into codes",
    "storages": "weights kept in",
    "needs": "needs first",
    "learning_rate": "learning rate",
    "presets": "presets of it",
    "bits_per_weight": "bits per weight",
    "state_bytes_per_value": "bytes of state per value",
    "in_backward": "steps inside backward",
    "rate_factor": "factor on the learning rate",
}


@click.command(cls=Verb, name="methods", short_help="List methods, presets, formats and optimizers.")
@click.argument("name", required=False, metavar="[NAME_OR_GLOB]")
@click.option("--model", help="Count on this model: a directory, a starter or a hub id; no weights are read.")
def command(name: str | None, model: str | None) -> dict[str, Any] | list[dict[str, Any]]:
    """List methods, presets, starts, formats, optimizers and schedules, or only those that match a GLOB such as
    `*tuning*`, or describe a NAME.

    With --model each line has the values it would train there, by formula, and its learning rate at that width.

    \b
        trimtab methods "*lora*" --model smollm2-135m-instruct
        trimtab methods pissa
    """
    from trimtab.catalog import describe, entries, look_up

    if name is None or any(mark in name for mark in "*?["):
        wanted = [entry for entry in entries() if fnmatchcase(entry[0], (name or "*").lower())]
        if not wanted:
            raise UserError(f"methods: no name matches {name!r}", fix=f"there are {listing(dict(entries()), 80)}")
        kept = [describe(*entry) for entry in wanted]
    else:
        kept = [described(*look_up(name))]
    if model is not None:
        count_on(model, kept)
    if name is not None and len(kept) == 1 and "text" in kept[0]:
        say(description(kept[0], model))
        return kept[0]
    say(table(kept, model))
    if model is not None:
        say("\nvalues: trained by the default settings, and their share of the model; rate: learning rate at its width")
    say("\ntrimtab methods NAME describes one; trimtab tune --method NAME trains it")
    return kept


def described(name: str, kind: str) -> dict[str, Any]:
    """The facts of one entry with its docstring; those of its start, where a preset has one, are inside."""
    from trimtab.catalog import describe, made_by

    facts = describe(name, kind) | {"text": inspect.getdoc(made_by(name, kind)) or ""}
    if facts.get("start"):
        facts["start"] = described(facts["start"], "start")
    return facts


def count_on(source: str, kept: Sequence[dict[str, Any]]) -> None:
    """Put what each entry comes to on a model under `on_model`."""
    from trimtab.catalog import on_model
    from trimtab.models.loading import outline
    from trimtab.train.prepare import width_of

    model = outline(source, progress=lambda line: say(line, err=True))
    width = width_of(model)
    for facts in kept:
        facts["on_model"] = on_model(facts["name"], model, width, facts["kind"])


def table(rows: Sequence[Mapping[str, Any]], model: str | None) -> str:
    """Entries, one a line, by kind."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        title = TITLES.get(row["kind"], f"{row['space']} methods")
        groups.setdefault(title, []).append(row)
    blocks = []
    for title, members in groups.items():
        lines = [tuple(line(row, model is not None)) for row in members]
        names = [("", "", "values", "share", "rate", "", "")] if model and members[0]["kind"] not in FLAGS else []
        right = (1, 2) if members[0]["kind"] in FLAGS else (2, 3, 4) if model else (2,)
        blocks.append(heading(title) + "\n" + columns([*names, *lines], right=right))
    return "\n\n".join(blocks)


def line(row: Mapping[str, Any], counted: bool) -> list[str]:
    """An entry as cells of the table."""
    found = row.get("on_model", {})
    if row["kind"] in FLAGS:
        held = [size(found["bytes"]) if "bytes" in found else ""] if counted else []
        return [row["name"], *held, amount(row), row["paper"], row["equation"]]
    cells = [row["name"], "merges" if row.get("mergeable") else ""]
    if counted and "problem" in found:
        cells += ["does not fit", "", ""]
    elif counted:
        cells += [f"{found['parameters']:,}", f"{found['share']:.3%}", f"{found['learning_rate']:g}"]
    else:
        cells += [f"{row['learning_rate']:g}"]
    return [*cells, row["paper"], row["equation"]]


def amount(row: Mapping[str, Any]) -> str:
    """What is counted of a format or an optimizer."""
    if row["kind"] == "storage":
        return f"{row['bits_per_weight']:g} bits"
    return f"{row['state_bytes_per_value']:g} bytes" if row["kind"] == "optim" else ""


def description(facts: Mapping[str, Any], model: str | None) -> str:
    """One entry for people: its docstring, its facts, its settings and how to use it."""
    lines = [heading(facts["name"]) + f"  {facts['summary']}"]
    for title, text in texts(facts):
        lines += ["", *([heading(title)] if title else []), *(f"  {one}".rstrip() for one in text.splitlines())]
    lines += ["", columns(known(facts))]
    if model is not None and facts["on_model"]:
        lines += ["", heading(f"on {model}"), columns(counted_on(facts["on_model"]))]
    if facts.get("parts"):
        parts = [
            (one.get("methods", "?"), f"at {one.get('where')!r}", f"learning rate {one['learning_rate']:g}")
            for one in facts["parts"]
        ]
        lines += ["", heading("parts"), columns(parts)]
    if facts["settings"]:
        flag = facts["kind"] in ("methods", "presets")
        flags = [
            ("--" + key.replace("_", "-") if flag else key, shown(one["default"]), one["type"])
            for key, one in facts["settings"].items()
        ]
        lines += ["", heading("settings and their defaults"), columns(flags)]
    if facts.get("laws"):
        lines += ["", heading("laws it does not keep, and why"), columns(list(facts["laws"].items()))]
    return "\n".join([*lines, "", use(facts)])


def texts(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The docstrings to show: the entry's own, or for a preset those of what it is made of."""
    from trimtab.catalog import made_by

    if facts["kind"] != "presets":
        return [("", facts["text"])]
    if facts["start"]:
        return [(f"the start {facts['start']['name']}", facts["start"]["text"])]
    names = [part["methods"] for part in facts["parts"]]
    return [(f"the method {name}", inspect.getdoc(made_by(name, "methods")) or "") for name in names]


def known(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The facts that are one line each."""
    rows = []
    for key, value in facts.items():
        if key in SHOWN_APART or value is None or value in ("", [], {}) or key == "width_power":
            continue
        words = worded(value)
        if key == "learning_rate":
            power = facts["width_power"]
            words += " at width 1024" + (f", as 1/width{'' if power == 1 else f'^{power:g}'}" if power else "")
        rows.append((WORDS.get(key, key), words))
    return rows


def counted_on(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What an entry comes to on a model, in lines."""
    if "problem" in found:
        return [("does not fit", found["problem"])]
    if "values" in found:
        return [("state, all trained", f"{size(found['bytes'])} for {found['values']:,} values")]
    if "bytes" in found:
        return [("linear weights", f"{found['weights']:,} in {size(found['bytes'])}")]
    return [
        ("trained values", f"{found['parameters']:,} ({found['share']:.3%} of the model)"),
        ("sites", f"{found['sites']:,}"),
        ("learning rate", f"{found['learning_rate']:g}"),
    ]


def use(facts: Mapping[str, Any]) -> str:
    """The command that uses an entry."""
    name = facts["name"]
    if facts["kind"] == "start":
        named = [f"--method {one}" for one in facts["presets"]] or [f"--method lora --start {name}"]
        return f"trimtab tune --model MODEL --data FILE {named[0]}"
    flag = f"{FLAGS.get(facts['kind'], '--method')} {name}"
    needs = " --quantize nf4" if "quantize" in facts.get("needs", []) else ""
    return f"trimtab tune --model MODEL --data FILE {flag}{needs}"


def worded(value: Any) -> str:
    """A fact as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else figure(value)


def shown(value: Any) -> str:
    """A default as text; a nested method by its name and settings."""
    if isinstance(value, Mapping):
        kind = next((key for key in ("methods", "start", "storage") if key in value), None)
        rest = ", ".join(f"{key}={shown(one)}" for key, one in value.items() if key != kind)
        return f"{value[kind]}({rest})" if kind else rest
    return str(value)
