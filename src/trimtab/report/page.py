"""What every report is made of: one HTML file that needs no network, of sections, drawings and sortable tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources

from trimtab.report.plots import Plot


def document(title: str, parts: Iterable[str]) -> str:
    """A page that needs nothing from outside, of these parts."""
    style, script = (
        resources.files("trimtab.report").joinpath(name).read_text("utf-8") for name in ("page.css", "page.js")
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,"><title>{escape(title)}</title>'
        f"<style>{style}</style></head>\n<body><main>\n"
        + "\n".join(filter(None, parts))
        + f"\n</main>\n<script>{script}</script></body></html>\n"
    )


def section(title: str, body: str) -> str:
    """A part of the page."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def plot(one: Plot) -> str:
    """A drawing with its words, which are also what is read where it is not seen."""
    label = f'<svg role="img" aria-label="{escape(one.words, quote=True)}"'
    return section(
        one.title, f"<figure>{one.svg.replace('<svg', label, 1)}<figcaption>{escape(one.words)}</figcaption></figure>"
    )


def sortable(heads: Sequence[str], rows: Iterable[str], caption: str = "") -> str:
    """A table whose heads sort it when clicked; `rows` are whole `<tr>` elements."""
    buttons = "".join(f'<th scope="col"><button type="button">{escape(word)}</button></th>' for word in heads)
    told = f"<caption>{escape(caption)}</caption>" if caption else ""
    head = f"{told}<thead><tr>{buttons}</tr></thead>"
    return f'<div class="wide"><table class="sortable">{head}<tbody>{"".join(rows)}</tbody></table></div>'
