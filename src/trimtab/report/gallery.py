"""The gallery of methods as one Markdown page, generated from docstrings, fields and the laws' exceptions."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.catalog import cell, describe, entries, linked, made_by

TITLES = {
    "weight": "Methods that change a weight",
    "hidden": "Methods that change an activation",
    "input": "Methods that add virtual tokens",
    "presets": "Presets",
    "start": "Starts of LoRA's factors",
    "storage": "Formats of frozen weights",
    "optim": "Optimizers and their parts",
    "active": "Schedules of what trains",
}
HEADINGS = {"storage": "format", "optim": "optimizer", "active": "schedule"}
RATE = ("learning_rate", "width_power")
INTRODUCTION = """# Methods

Everything that `--method`, `start=`, `--quantize`, `--optimizer` and `--active` know, generated from the source by
`trimtab.report.gallery`; a test compares. The text of each is its docstring: the equation, shapes and starts, cost, and
where it differs from the paper's code. `trimtab methods NAME --model MODEL` says what it comes to on a model.

Every method is tested for the same laws. What one does not keep is listed with it, and is tested to fail as stated.
"""


def gallery() -> str:
    """The whole page."""
    blocks = [INTRODUCTION, laws(), contents()]
    for title, names in sections().items():
        blocks.append(f"## {title}\n")
        blocks += [page(name, kind) for name, kind in names]
    return "\n".join(blocks).rstrip() + "\n"


def write(path: str | Path) -> Path:
    """Write the page to a file, whose directory is made if needed."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(gallery(), encoding="utf-8")
    return target


def sections() -> dict[str, list[tuple[str, str]]]:
    """Title -> entries, methods by space."""
    found: dict[str, list[tuple[str, str]]] = {title: [] for title in TITLES.values()}
    for name, kind in entries():
        group = describe(name, kind)["space"] if kind == "methods" else kind
        found[TITLES[group]].append((name, kind))
    return {title: names for title, names in found.items() if names}


def contents() -> str:
    """The index: a line of links for each section."""
    lines = [
        f"- {title}: " + ", ".join(f"[{name}](#{anchor(name, kind)})" for name, kind in names)
        for title, names in sections().items()
    ]
    return "\n".join(lines) + "\n"


def anchor(name: str, kind: str) -> str:
    """Where a heading of this page is linked to."""
    return heading_of(name, kind).lower().replace(" ", "-")


def heading_of(name: str, kind: str) -> str:
    """The heading of an entry; a preset and a start may share a name."""
    return name if kind == "methods" else f"{name} {HEADINGS.get(kind, kind.removesuffix('s'))}"


def laws() -> str:
    """The laws by name, in a line."""
    from trimtab.laws import LAWS

    return "The laws: " + ", ".join(f"{law.number} {law.name}" for law in LAWS) + ".\n"


def page(name: str, kind: str) -> str:
    """One entry: its docstring, its facts as a table."""
    facts = describe(name, kind)
    rows = [("paper", linked(facts["paper"])), *facts_of(facts)]
    table = ["| | |", "|---|---|", *(f"| {key} | {cell(value)} |" for key, value in rows if value)]
    doc = inspect.getdoc(made_by(name, kind)) or ""
    text = ["", "```text", doc, "```", ""]
    return "\n".join([f"### {heading_of(name, kind)}", *text, *table, ""])


def facts_of(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a table says of an entry, in words."""
    settings = ", ".join(f"`{key}={short(one['default'])}`" for key, one in facts["settings"].items())
    if facts["kind"] == "storage":
        return [("bits per weight", f"{facts['bits_per_weight']:g} at 4096 x 4096"), ("settings", settings)]
    if facts["kind"] == "active":
        return [("settings", settings)]
    if facts["kind"] == "optim":
        return [
            ("bytes of state", f"{facts['state_bytes_per_value']:g} per value of a 4096 x 4096 matrix"),
            ("steps", "inside backward" if facts["in_backward"] else ""),
            ("learning rate", f"{facts['rate_factor']:g} times the method's"),
            ("settings", settings),
        ]
    rows = [("where", f"`{facts['where']}`"), ("sites", ", ".join(facts["hosts"]))]
    if facts["kind"] == "presets":
        made = [f"`{short(without(part))}` at `{part['where']}`" for part in facts["parts"]]
        rows.append(("made of", " + ".join(made)))
    rows += [
        ("merges", merging(facts)),
        ("kept in", ", ".join(facts["storages"])),
        ("needs", ", ".join(facts["needs"])),
        ("learning rate", rate(facts)),
        ("settings", settings),
        ("presets", ", ".join(f"`{one}`" for one in facts.get("presets", []))),
    ]
    return rows + [(f"not {law}", reason) for law, reason in facts["laws"].items()]


def without(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a preset without its place and rate."""
    return {key: value for key, value in part.items() if key not in ("where", *RATE)}


def short(value: Any) -> str:
    """A setting as it is written in Python: `LoRA` settings nested, texts in quotes."""
    if isinstance(value, Mapping):
        kind = next((key for key in ("methods", "start", "storage") if key in value), None)
        rest = ", ".join(f"{key}={short(one)}" for key, one in value.items() if key != kind)
        return f"{value[kind]}({rest})" if kind else f"{{{rest}}}"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(short, value)) + ")"
    return f'"{value}"' if isinstance(value, str) else str(value)


def merging(facts: Mapping[str, Any]) -> str:
    """Whether and how it folds into the frozen weight."""
    if not facts["mergeable"]:
        return "no"
    return "yes, exactly into codes too" if facts["merges_into_codes"] else "yes; codes become dense, or are made anew"


def rate(facts: Mapping[str, Any]) -> str:
    """The learning rate by default and how it goes with the width."""
    words = []
    for one in facts.get("parts") or [facts]:
        value, power = (one[key] for key in RATE)
        falls = "" if not power else ", falls as 1/width" if power == 1 else f", falls as 1/width^{power:g}"
        words.append(f"{value:g} at width 1024{falls}")
    return "; ".join(dict.fromkeys(words))
