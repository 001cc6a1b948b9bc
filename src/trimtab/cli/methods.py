"""`trimtab methods`: what can be trained, each with its paper and its settings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import click

from trimtab.cli.verb import Verb, columns, figure, heading, say
from trimtab.core.errors import UserError, listing, nearest

TITLES = {"preset": "presets", "storage": "storage formats, for --quantize"}
SHOWN_APART = ("name", "class", "settings", "fields", "laws", "equation", "parts")


@click.command(cls=Verb, name="methods", short_help="List the methods and presets.")
@click.argument("name", required=False, metavar="[NAME_OR_GLOB]")
def command(name: str | None) -> dict[str, Any] | list[dict[str, Any]]:
    """List methods, presets and formats, only those that match a GLOB such as `*tuning*`, or describe one by NAME."""
    from trimtab.catalog import describe

    known = everything()
    if name is None or any(mark in name for mark in "*?["):
        kept = [describe(one) for one in known if fnmatchcase(one, (name or "*").lower())]
        if not kept:
            raise UserError(f"methods: no name matches {name!r}", fix=f"there are {listing(known, 60)}")
        say(table(kept))
        say("\ntrimtab methods NAME describes one; trimtab tune --method NAME trains it")
        return [plain(one) for one in kept]
    spellings = {one.replace("_", ""): one for one in known}
    wanted = spellings.get(name.lower().replace("-", "").replace("_", ""))
    if wanted is None:
        close = nearest(name, known)
        fix = f"did you mean {listing(close)}?" if close else f"there are {listing(known, 60)}"
        raise UserError(f"no method, preset or format named {name!r}", fix=fix)
    facts = describe(wanted)
    text = inspect.getdoc(known[wanted]) or ""
    say(description(facts, text))
    return {**plain(facts), "text": text}


def everything() -> dict[str, Any]:
    """Name -> class or function of every method, preset and storage format."""
    from trimtab.catalog import formats, methods, presets

    return {**methods(), **presets(), **formats()}


def plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts as JSON knows them: `fields` has the defaults."""
    return {key: value for key, value in facts.items() if key != "settings"}


def table(rows: list[dict[str, Any]]) -> str:
    """Methods, presets and formats, one a line, by kind."""
    blocks = []
    for space in dict.fromkeys(row["space"] for row in rows):
        lines = [
            (row["name"], "merges" if row.get("mergeable") else "", row.get("paper") or "", row["equation"])
            for row in rows
            if row["space"] == space
        ]
        blocks.append(heading(TITLES.get(space, f"{space} methods")) + "\n" + columns(lines))
    return "\n\n".join(blocks)


def description(facts: Mapping[str, Any], text: str) -> str:
    """One method, preset or format for people: its docstring, its settings and how to use it."""
    rows = [
        (key.replace("_", " "), worded(value))
        for key, value in facts.items()
        if key not in SHOWN_APART and value not in (None, "", [], {})
    ]
    lines = [heading(facts["name"]), *(f"  {line}".rstrip() for line in text.splitlines()), "", columns(rows)]
    if facts.get("parts"):
        parts = [(one.get("methods", "?"), f"at {one.get('where')!r}") for one in facts["parts"]]
        lines += ["", heading("parts"), columns(parts)]
    if facts["settings"]:
        dashed = facts["space"] != "storage"
        flags = [
            ("--" + key.replace("_", "-") if dashed else key, str(value)) for key, value in facts["settings"].items()
        ]
        lines += ["", heading("settings and their defaults"), columns(flags)]
    if facts.get("laws"):
        lines += ["", heading("laws it does not keep, and why"), columns(list(facts["laws"].items()))]
    use = f"--quantize {facts['name']}" if facts["space"] == "storage" else f"--method {facts['name']}"
    return "\n".join([*lines, "", f"trimtab tune --model MODEL --data FILE {use}"])


def worded(value: Any) -> str:
    """A fact as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else figure(value)
