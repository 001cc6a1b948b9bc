"""Plots of a contest, each as SVG text for a page and as files: quality against cost, learning curves, differences."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INK = "#7a7f87"
"""Axes and words: readable on white and on black."""
COSTS = {
    "seconds": ("time to train", "seconds", 1.0),
    "peak_bytes": ("peak memory", "GB", 1e9),
    "saved_bytes": ("saved file", "MB", 1e6),
}


@dataclass(frozen=True)
class Plot:
    """A drawing: its file name, a title, what it shows in words, and its SVG text."""

    name: str
    title: str
    words: str
    svg: str


def plots(result: Mapping[str, Any], folder: Path) -> list[Plot]:
    """Every plot that the result has figures for, written to `folder` as SVG and PNG too."""
    drawn = [pareto(result, key, folder) for key in COSTS]
    return [one for one in (*drawn, curves(result, folder), intervals(result, folder)) if one is not None]


def figure(width: float = 6.4, height: float = 4.0) -> Any:
    """An empty drawing with one pair of axes in grey on nothing, so that a page's own colours show through."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    made.patch.set_alpha(0)
    axes = made.subplots()
    axes.patch.set_alpha(0)
    axes.tick_params(colors=INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    axes.grid(color=INK, alpha=0.2, linewidth=0.6)
    axes.set_axisbelow(True)
    return made, axes


def legend(axes: Any, ncols: int = 1) -> None:
    """A legend in the grey of the axes."""
    for text in axes.legend(frameon=False, fontsize=8, ncols=ncols).get_texts():
        text.set_color(INK)


def finished(made: Any, folder: Path, name: str, title: str, words: str) -> Plot:
    """The drawing as SVG and PNG files, and as text for a page."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        text = io.StringIO()
        made.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
    made.patch.set_alpha(1)
    made.patch.set_facecolor("white")
    made.savefig(folder / f"{name}.png", dpi=150)
    return Plot(name, title, words, svg[svg.index("<svg") :])


def quality(row: Mapping[str, Any], task: str) -> float:
    """What a row is judged by."""
    return float(row["accuracy"] if task == "classify" else row["loss"])


def pareto(result: Mapping[str, Any], key: str, folder: Path) -> Plot | None:
    """Quality against one cost, with the line of those that nothing beats in both."""
    task, (title, unit, scale) = result["task"], COSTS[key]
    rows = [row for row in result["table"] if row.get(key)]
    if len(rows) < 2:
        return None
    points = [(row[key] / scale, quality(row, task), row["name"]) for row in rows]
    best = front(points, higher=task == "classify")
    made, axes = figure()
    axes.plot([x for x, _, _ in best], [y for _, y, _ in best], color="#2a78d6", linewidth=1.2, alpha=0.7)
    for x, y, name in points:
        chosen = name == result["verdict"]["recommended"]
        axes.scatter([x], [y], s=64 if chosen else 36, color="#d9480f" if chosen else "#2a78d6", zorder=3)
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(6, 5), fontsize=9, color=INK)
    spread = max(x for x, _, _ in points) / max(1e-12, min(x for x, _, _ in points))
    if spread > 20:
        axes.set_xscale("log")
    axes.margins(x=0.15, y=0.15)
    word = "accuracy" if task == "classify" else "loss"
    axes.set_xlabel(f"{title}, {unit}", color=INK)
    axes.set_ylabel(f"{word} on the rows that judge", color=INK)
    listed = ", ".join(f"{name} ({x:.3g} {unit}, {y:.4g})" for x, y, name in best)
    words = f"{word.capitalize()} against {title}. Nothing is better in both than: {listed}."
    return finished(made, folder, f"{key.split('_')[0]}", f"Quality against {title}", words)


def front(points: Sequence[tuple[float, float, str]], higher: bool) -> list[tuple[float, float, str]]:
    """The points that no other beats in both, by rising cost."""
    sign, kept, best = (1.0 if higher else -1.0), [], float("-inf")
    for point in sorted(points, key=lambda one: (one[0], -sign * one[1])):
        if sign * point[1] > best:
            kept.append(point)
            best = sign * point[1]
    return kept


def curves(result: Mapping[str, Any], folder: Path) -> Plot | None:
    """Training loss over the steps of the first seed."""
    found = {name: runs[0]["curve"] for name, runs in result["runs"].items() if runs and runs[0].get("curve")}
    if not found:
        return None
    from matplotlib import colormaps

    made, axes = figure()
    colours = colormaps["tab10"].colors  # type: ignore[attr-defined]
    for index, (name, points) in enumerate(found.items()):
        style = ("-", "--", ":")[index // 10 % 3]
        steps, losses = [step for step, _ in points], smoothed([loss for _, loss in points])
        axes.plot(steps, losses, linewidth=1.4, color=colours[index % 10], linestyle=style, label=name)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("training loss, smoothed", color=INK)
    legend(axes, ncols=2)
    ends = ", ".join(f"{name} {smoothed([loss for _, loss in points])[-1]:.3g}" for name, points in found.items())
    return finished(made, folder, "curves", "Learning curves", f"Training loss of the first seed; at the end: {ends}.")


def smoothed(values: Sequence[float], keep: float = 0.8) -> list[float]:
    """A running mean of a curve."""
    kept, state = [], values[0]
    for value in values:
        state = keep * state + (1 - keep) * value
        kept.append(state)
    return kept


def intervals(result: Mapping[str, Any], folder: Path) -> Plot | None:
    """Distance of every contestant to the leader, with its interval."""
    found = result["verdict"].get("differences") or {}
    if not found:
        return None
    names = sorted(found, key=lambda name: float(found[name]["mean"]), reverse=True)
    made, axes = figure(height=1.2 + 0.4 * len(names))
    for place, name in enumerate(names):
        one = found[name]
        colour = INK if one["tie"] else "#d9480f"
        axes.plot([one["low"], one["high"]], [place, place], color=colour, linewidth=2)
        axes.scatter([one["mean"]], [place], color=colour, zorder=3)
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(range(len(names)), names)
    leader = result["verdict"]["leader"]
    word = "accuracy" if result["task"] == "classify" else "loss"
    axes.set_xlabel(f"how much worse than {leader} in {word}; grey: a tie", color=INK)
    told = "; ".join(f"{name} {found[name]['low']:.3g} to {found[name]['high']:.3g}" for name in reversed(names))
    return finished(made, folder, "differences", f"Distance to {leader}", f"Intervals of the difference: {told}.")
