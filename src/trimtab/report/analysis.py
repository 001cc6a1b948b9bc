"""The analysis of one or several runs as one HTML file: length against direction, spectra, and a table of all sites."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from html import escape
from pathlib import Path

from trimtab.core.files import write_together
from trimtab.interop.analysis import Analysis, described
from trimtab.report.page import document, plot, section, sortable
from trimtab.report.plots import INK, Plot, figure, finished, legend

COLOURS = ("#2a78d6", "#d9480f", "#2b8a3e", "#862e9c", "#e67700", "#0b7285")


def write(analyses: Mapping[str, Analysis], path: Path) -> Path:
    """Write the page; `analyses` by the name of their run."""
    with tempfile.TemporaryDirectory() as folder:
        drawn = [scatter(analyses, Path(folder)), spectra(analyses, Path(folder))]
    title = "What was learned: " + ", ".join(analyses)
    words = "".join(f"<li>{escape(f'{name}: {described(one)}')}</li>" for name, one in analyses.items())
    parts = [f"<h1>{escape(title)}</h1>", section("In words", f"<ul>{words}</ul>"), *map(plot, drawn)]
    parts += [section(f"Sites of {name}", table(one)) for name, one in analyses.items()]
    write_together(path.parent, {path.name: document(title, parts).encode("utf-8")})
    return path


def scatter(analyses: Mapping[str, Analysis], folder: Path) -> Plot:
    """ΔM against ΔD, a point a site."""
    made, axes = figure()
    told = []
    for index, (name, one) in enumerate(analyses.items()):
        points = [(change.direction, change.magnitude) for change in one.changes]
        axes.scatter(*zip(*points, strict=True), s=16, alpha=0.7, color=COLOURS[index % len(COLOURS)], label=name)
        r = one.correlation
        told.append(f"{name}: r = {r:+.2f}" if r is not None else f"{name}: no correlation to tell")
    axes.set_xlabel("ΔD, change of direction", color=INK)
    axes.set_ylabel("ΔM, change of length", color=INK)
    legend(axes)
    words = f"Change of length against change of direction, a point for each site. {'; '.join(told)}."
    return finished(made, folder, "length-direction", "Length and direction", words)


def spectra(analyses: Mapping[str, Analysis], folder: Path) -> Plot:
    """The share of the update in its first singular values, mean over the sites that changed."""
    made, axes = figure()
    told = []
    for index, (name, one) in enumerate(analyses.items()):
        moved = [change for change in one.changes if change.rank]
        counts = sorted({count for change in moved for count in change.energy_at})
        means = []
        for count in counts:
            shares = [change.energy_at.get(count, 1.0) for change in moved]
            means.append(100 * sum(shares) / len(shares))
        axes.plot(counts, means, marker="o", markersize=4, color=COLOURS[index % len(COLOURS)], label=name)
        if moved:
            rank = sum(change.effective_rank for change in moved) / len(moved)
            told.append(f"{name}: effective rank {rank:.2f} in the mean, {means[0]:.0f} % in the first direction")
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 105)
    axes.set_xlabel("singular values", color=INK)
    axes.set_ylabel("share of the update, %", color=INK)
    legend(axes)
    words = f"Share of the squared update in its first singular values. {'; '.join(told) or 'Nothing changed'}."
    return finished(made, folder, "spectrum", "Spectrum of the update", words)


HEADS = ("site", "ΔM", "ΔD", "‖ΔW‖/‖W‖", "rank", "effective rank", "amplification", "overlap")


def table(one: Analysis) -> str:
    """All sites; a click on a head sorts by it."""
    rows = []
    for change in one.changes:
        values = (change.magnitude, change.direction, change.relative, change.rank, change.effective_rank)
        cells = [f'<th scope="row">{escape(change.site)}</th>']
        for value in (*values, change.amplification, change.overlap):
            cells.append("<td></td>" if value is None else f'<td data-value="{value}">{value:.4g}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return sortable(HEADS, rows)
