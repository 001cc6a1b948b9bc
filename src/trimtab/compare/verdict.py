"""What a contest allows to be said: the standings, which differences are real, and which method to take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.compare.setup import Entry
from trimtab.compare.statistics import Difference, difference, needed_rows, together

LEVEL = 0.95
COSTS = {"seconds": "time", "peak_bytes": "peak memory", "saved_bytes": "file size"}
"""What a tie is decided on, with its word."""


def standings(
    entries: Sequence[Entry], finals: Mapping[str, Sequence[Mapping[str, Any]]], task: str
) -> list[dict[str, Any]]:
    """A row for every contestant with a final run, best first."""
    rows = []
    for entry in entries:
        runs = finals.get(entry.name, [])
        if not runs:
            continue
        row: dict[str, Any] = {"name": entry.name, "kind": entry.kind, "seeds": len(runs)}
        row["loss"] = mean(run["judge"]["loss"] for run in runs)
        row["losses"] = [run["judge"]["loss"] for run in runs]
        if task == "classify":
            row["accuracy"] = mean(run["judge"]["accuracy"] for run in runs)
        for key in (
            "seconds",
            "peak_bytes",
            "predicted_bytes",
            "saved_bytes",
            "trainable",
            "rate",
            "factor",
            "settings",
            "reference_loss",
        ):
            values = [run[key] for run in runs if run.get(key) is not None]
            if values:
                row[key] = max(values) if key in LARGEST else values[0] if key in KEPT else mean(values)
        rows.append(row)
    before = next((row.get("reference_loss") for row in rows if row["name"] == "untuned"), None)
    for row in rows:
        if before is not None and row["name"] != "untuned" and "reference_loss" in row:
            row["forgetting"] = row["reference_loss"] - before
    return sorted(rows, key=lambda row: score(row, task))


LARGEST = ("peak_bytes", "predicted_bytes")
KEPT = ("saved_bytes", "trainable", "rate", "factor", "settings")


def mean(values: Any) -> float:
    """The arithmetic mean."""
    listed = list(values)
    return sum(listed) / len(listed)


def score(row: Mapping[str, Any], task: str) -> tuple[float, float]:
    """Lower is better: errors of a classifier, with the loss behind; else the loss."""
    return (1 - row["accuracy"], row["loss"]) if task == "classify" else (row["loss"], 0.0)


def measure(task: str) -> tuple[str, str]:
    """(key of the row sums that are compared, word for their mean)."""
    return ("right", "accuracy") if task == "classify" else ("losses", "loss" if task != "regress" else "squared error")


def apart(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], task: str, level: float) -> Difference:
    """How much worse `one` is than `other`: above 0 is worse, over the seeds that both have."""
    key, _ = measure(task)
    seeds = min(len(one), len(other)) if len(one) > 1 and len(other) > 1 else 1
    sign = -1.0 if task == "classify" else 1.0
    mine, theirs = ([[sign * value for value in run["judge"][key]] for run in runs[:seeds]] for runs in (one, other))
    return difference(mine, theirs, one[0]["judge"]["terms"], level=level)


def verdict(
    table: Sequence[Mapping[str, Any]], finals: Mapping[str, Sequence[Mapping[str, Any]]], task: str, rows: int
) -> dict[str, Any]:
    """The recommendation as data and as sentences.

    The leader is the contestant of the best mean. Every other one gets the interval of its distance to it, all at once
    at 95 %. Those whose interval holds 0 tie with the leader; among them the one with the smallest product of relative
    time, memory and file size is recommended.
    """
    able = [row for row in table if row["kind"] == "method"]
    if not able:
        return {
            "recommended": None,
            "sentences": ["No method finished a run: there is nothing to recommend."],
            "differences": {},
        }
    leader = able[0]["name"]
    others = [row["name"] for row in table if row["name"] != leader]
    level = together(LEVEL, len(others))
    found = {name: apart(finals[name], finals[leader], task, level) for name in others}
    tied = [row for row in able if row["name"] == leader or found[row["name"]].tie]
    taken = min(tied, key=lambda row: expense(row, tied))
    told = sentences(table, leader, taken, tied, found, task, rows)
    kept = {
        name: {"mean": one.mean, "low": one.low, "high": one.high, "level": one.level, "tie": one.tie}
        for name, one in found.items()
    }
    return {
        "leader": leader,
        "recommended": taken["name"],
        "tied": [row["name"] for row in tied],
        "differences": kept,
        "sentences": told,
    }


def expense(row: Mapping[str, Any], rivals: Sequence[Mapping[str, Any]]) -> float:
    """Log of the product of a method's costs, each relative to the cheapest rival."""
    total = 0.0
    for key in COSTS:
        if row.get(key):
            total += math.log(row[key] / min(other[key] for other in rivals if other.get(key)))
    return total


def sentences(
    table: Sequence[Mapping[str, Any]],
    leader: str,
    taken: Mapping[str, Any],
    tied: Sequence[Mapping[str, Any]],
    found: Mapping[str, Difference],
    task: str,
    rows: int,
) -> list[str]:
    """The recommendation in words: what to take, why, and what cannot be told."""
    _, word = measure(task)
    by_name = {row["name"]: row for row in table}
    key = "accuracy" if task == "classify" else "loss"
    level = next(iter(found.values())).level if found else LEVEL
    told = [f"Take {taken['name']}: {word} {by_name[taken['name']][key]:.4g} on {rows} rows that chose nothing."]
    rivals = [row["name"] for row in tied if row["name"] != taken["name"]]
    if rivals:
        told.append(
            f"It ties with {', '.join(rivals)}: their differences in {word} are within what rows and seeds vary by. "
            f"Of these it costs the least ({costs(taken)})."
        )
        told += [f"{name} needs {costs(by_name[name])}." for name in rivals]
    else:
        told.append(f"It is better than every other method here ({costs(taken)}).")
    lost = sorted((row["forgetting"], row["name"]) for row in table if row["kind"] == "method" and "forgetting" in row)
    if lost:
        (least, first), (most, last) = lost[0], lost[-1]
        further = f"; {last} changed it most, by {most:+.3f}" if last != first else ""
        told.append(f"On text of another kind the loss changed least with {first}, by {least:+.3f}{further}.")
    for name, one in found.items():
        if by_name[name]["kind"] == "method" and not one.tie:
            told.append(
                f"{name} is worse than {leader} by {one.mean:.3g} ({one.low:.3g} to {one.high:.3g}), significantly."
            )
    for name, one in found.items():
        if by_name[name]["kind"] != "reference":
            continue
        if one.tie:
            told.append(f"Not significant: whether {leader} is better than {name}, the reference.")
        elif one.mean < 0:
            told.append(f"The reference {name} is better than every method, by {-one.mean:.3g}.")
        else:
            told.append(f"{leader} is better than {name} by {one.mean:.3g} ({one.low:.3g} to {one.high:.3g}).")
    close = [one for name, one in found.items() if name in rivals and one.mean > 0]
    if close:
        needed = [count for count in (needed_rows(one, rows) for one in close) if count]
        if needed:
            told.append(
                f"To tell the ties apart, about {min(needed):,} to {max(needed):,} held-out rows would be needed."
            )
    told.append(
        f"Intervals are over rows and seeds, paired, and hold all at once at {LEVEL:.0%} (each at {level:.1%}). "
        "They say nothing about other data, other budgets or settings that were not tried."
    )
    return told


def once(row: Mapping[str, Any]) -> str:
    """A remark where an interval is over rows alone."""
    return ", over the rows of one seed" if row["seeds"] == 1 else ""


def costs(row: Mapping[str, Any]) -> str:
    """Time, memory and size of a method in words."""
    told = []
    if row.get("seconds"):
        told.append(f"{row['seconds']:.3g} s")
    if row.get("peak_bytes"):
        told.append(f"{row['peak_bytes'] / 1e9:.3g} GB")
    if row.get("saved_bytes"):
        told.append(f"{row['saved_bytes'] / 1e6:.3g} MB on disk")
    return ", ".join(told)
