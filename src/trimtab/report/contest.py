"""The report of a contest: one HTML file that needs no network, with plots beside it as PNG and SVG."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from trimtab.core.files import write_together
from trimtab.report.page import document, plot, section, sortable
from trimtab.report.plots import Plot, plots

PAGE = "report.html"
COLUMNS = (
    ("name", "method"),
    ("quality", ""),
    ("loss", "loss"),
    ("rate", "learning rate"),
    ("trainable", "trained values"),
    ("seconds", "time"),
    ("peak_bytes", "peak memory"),
    ("predicted_bytes", "predicted"),
    ("saved_bytes", "saved file"),
    ("forgetting", "forgetting"),
    ("seeds", "seeds"),
    ("remarks", "remarks"),
)
LEFT = ("name", "remarks")


def write(result: Mapping[str, Any], folder: Path) -> Path:
    """Write `report.html` and the plots into the directory of a contest; returns the page."""
    drawn = plots(result, folder / "plots")
    write_together(folder, {PAGE: page(result, drawn).encode("utf-8")})
    return folder / PAGE


def page(result: Mapping[str, Any], drawn: list[Plot]) -> str:
    """The whole page."""
    setup, verdict = result["setup"], result["verdict"]
    title = f"{Path(setup['model']).name} on {Path(setup['data']).name}"
    taken = verdict["recommended"]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(f"Recommended: {taken}" if taken else "No recommendation")}</p>',
        section("Why", "<ul>" + "".join(f"<li>{escape(one)}</li>" for one in verdict["sentences"]) + "</ul>"),
        section("Standings", table(result)),
        *(plot(one) for one in drawn),
        section("Answers", samples(result)) if any_samples(result) else "",
        section("Not run to the end", pairs(result["skipped"])) if result["skipped"] else "",
        section("Settings", pairs(settings(result))),
    ]
    return document(title, parts)


def table(result: Mapping[str, Any]) -> str:
    """The standings; a click on a head sorts by it."""
    shown = [(key, word) for key, word in COLUMNS if used(result, key)]
    quality = "accuracy" if result["task"] == "classify" else "loss"
    heads = [quality if key == "quality" else word for key, word in shown]
    rows = []
    for row in result["table"]:
        cells = []
        for key, _ in shown:
            value, text = cell(row, key, result)
            sort = "" if value is None else f' data-value="{value}"'
            kind = "th" if key == "name" else "td"
            scope = ' scope="row"' if key == "name" else ""
            side = ' class="left"' if key in LEFT else ""
            cells.append(f"<{kind}{scope}{sort}{side}>{escape(text)}</{kind}>")
        chosen = ' class="chosen"' if row["name"] == result["verdict"]["recommended"] else ""
        rows.append(f"<tr{chosen}>{''.join(cells)}</tr>")
    caption = f"Measured on {result['rows']['judge']} rows that chose nothing; final runs of {result['steps']} steps."
    return sortable(heads, rows, caption)


def used(result: Mapping[str, Any], key: str) -> bool:
    """Whether a column has anything in it."""
    if key == "loss":
        return bool(result["task"] == "classify")
    return key in ("name", "quality", "remarks") or any(row.get(key) is not None for row in result["table"])


def cell(row: Mapping[str, Any], key: str, result: Mapping[str, Any]) -> tuple[float | None, str]:
    """(number to sort by, text) of a cell."""
    if key == "name":
        return None, row["name"]
    if key == "remarks":
        return None, "; ".join(remarks(row, result))
    value = row["accuracy" if result["task"] == "classify" else "loss"] if key == "quality" else row.get(key)
    if value is None:
        return None, ""
    words = {
        "seconds": f"{value:.1f} s",
        "peak_bytes": f"{value / 1e9:.2f} GB",
        "predicted_bytes": f"{value / 1e9:.2f} GB",
        "forgetting": f"{value:+.3f}",
        "saved_bytes": f"{value / 1e6:.3g} MB",
        "trainable": f"{value:,.0f}",
        "rate": f"{value:.2g}",
        "seeds": f"{value:.0f}",
    }
    return float(value), words.get(key, f"{value:.4f}")


def remarks(row: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    """What is to be known of a row."""
    verdict, name = result["verdict"], row["name"]
    found = ["reference"] if row["kind"] == "reference" else []
    if name == verdict.get("leader"):
        found.append("best mean")
    elif (verdict["differences"].get(name) or {}).get("tie"):
        found.append("tie with the best")
    if row.get("settings"):
        found.append(", ".join(f"{key} {value}" for key, value in row["settings"].items()))
    if row.get("edge") and row["kind"] == "method":
        found.append("best rate at the edge of those tried")
    return found


def any_samples(result: Mapping[str, Any]) -> bool:
    """Whether the model was asked for answers."""
    return any(runs and runs[0].get("samples") for runs in result["runs"].values())


def samples(result: Mapping[str, Any]) -> str:
    """What was asked and wanted, and what the untuned model and the first methods answer."""
    order = ["untuned", *[row["name"] for row in result["table"] if row["kind"] == "method"][:3]]
    asked: dict[str, list[tuple[str, str]]] = {}
    for name in order:
        runs = result["runs"].get(name) or []
        for one in (runs[0].get("samples") or []) if runs else []:
            lines = asked.setdefault(one["prompt"], [("wanted", one["wanted"])])
            lines.append((name, one["answer"]))
    blocks = []
    for prompt, lines in asked.items():
        told = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text.strip())}</dd>" for name, text in lines)
        blocks.append(f"<details open><summary>{escape(prompt)}</summary><dl>{told}</dl></details>")
    return "".join(blocks)


def settings(result: Mapping[str, Any]) -> dict[str, Any]:
    """What it was run with."""
    setup, cost = result["setup"], result["cost"]
    kept = {key: value for key, value in setup.items() if value not in (None, {}, [], False)}
    kept |= {"rows": ", ".join(f"{count} {name}" for name, count in result["rows"].items())}
    kept |= {
        "steps in all": f"{cost['steps']:,} (a full grid: {cost['naive_steps']:,})",
        "time in all": f"{cost['seconds']:.0f} s",
    }
    return kept | {key: value for key, value in result["conditions"].items() if key != "dtype"}


def pairs(found: Mapping[str, Any]) -> str:
    """Names and values as a list."""
    told = []
    for key, value in found.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {one}" for name, one in value.items())
        elif isinstance(value, list | tuple):
            value = ", ".join(map(str, value))
        told.append(f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>")
    return f"<dl>{''.join(told)}</dl>"
