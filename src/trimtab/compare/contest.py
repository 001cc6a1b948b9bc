"""The contest: rates by successive halving, final runs over all seeds, losers stopped early, and what may be said."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.compare.runs import ROWS, Hall
from trimtab.compare.setup import FEWEST, FIRST, SAME, Entry, Setup, cost, entries_of, naive_cost, write_parts
from trimtab.compare.statistics import difference
from trimtab.compare.verdict import standings, verdict
from trimtab.compare.watcher import Watcher
from trimtab.core.errors import UserError, listing
from trimtab.core.files import write_together
from trimtab.train.rundir import versions

CONTEST, RESULT = "contest.json", "result.json"
TIMED_STEPS = 3
SHORTEST = 20
"""Steps a run of the first round has at least, if a final one has them."""
CERTAIN = 0.999
MARGIN = 0.2
"""A method's other seeds are not run where, at the level `CERTAIN`, its loss is above another's by this share of it."""


def compare(setup: Setup, folder: str | Path, watcher: Watcher | None = None) -> dict[str, Any]:
    """Hold the contest in a directory and return its result, which is also there as `result.json`.

    Every contestant gets the same rows, steps, seeds and learning-rate budget: the rates `setup.rates` times its own
    default in runs of a quarter of the length, then `setup.refine` times the best of them in runs of full length, of
    which the best goes on with the other seeds. The smaller part of the held-out rows chooses, the larger judges.
    Called again on its directory it goes on behind the last finished run, and may name more methods or seeds. Errors:
    `UserError` for what is wrong in the setup, before the first run; a run that fails only takes its method out.
    """
    watch, folder = watcher or Watcher(), Path(folder)
    names = [one.name for one in entries_of(setup, "causal", True)]
    watch.stage(f"{listing(names, 30)}")
    counts = opened(setup, folder)
    hall = Hall(setup, folder)
    entries = entries_of(setup, hall.task, full_fits(hall))
    watch.note(f"{hall.task}: {counts['train']} rows train, {counts['choose']} choose rates, {counts['judge']} judge")
    began = time.monotonic()
    timed = {one.name: timed_run(hall, one, watch) for one in entries if one.trains}
    steps = final_steps(setup, hall, entries, timed)
    watch.note(cost_line(setup, entries, steps, timed))
    finals, skipped = held(hall, entries, steps, watch, began)
    table = standings(entries, finals, hall.task)
    for row in table:
        row["edge"] = row.get("factor") in edges(setup)
    result = {
        "setup": plain(setup),
        "task": hall.task,
        "rows": counts,
        "steps": steps,
        "cost": {
            "steps": round(sum(cost(setup, one) for one in entries) * steps),
            "naive_steps": round(sum(naive_cost(setup, one) for one in entries) * steps),
            "seconds": round(sum(run["total_seconds"] for run in hall.journal.known.values()), 1),
        },
        "table": table,
        "verdict": verdict(table, finals, hall.task, counts["judge"]),
        "skipped": skipped,
        "runs": {name: [light(run) for run in runs] for name, runs in finals.items()},
        "conditions": {
            "versions": versions(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "dtype": setup.dtype,
        },
    }
    write_together(folder, {RESULT: (json.dumps(result, indent=1, default=str) + "\n").encode()})
    return result


def opened(setup: Setup, folder: Path) -> dict[str, int]:
    """The directory with its rows; one that holds another contest is an error."""
    kept = plain(setup)
    path = folder / CONTEST
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            found, counts = before["setup"], before["rows"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"compare: {path} cannot be read", fix="choose another --output") from None
        same = (*SAME, "data", "heldout", "limit", "rates", "refine")
        if other := [key for key in same if found.get(key) != kept[key]]:
            raise UserError(
                f"compare: {folder} holds another contest: {listing(other)} differ", fix="choose another --output"
            )
        if all((folder / ROWS / f"{name}.jsonl").is_file() for name in ("train", "choose", "judge")):
            return dict(counts)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"compare: {folder} is not empty and holds no contest", fix="choose another --output")
    counts = write_parts(setup, folder / ROWS)
    write_together(folder, {CONTEST: (json.dumps({"setup": kept, "rows": counts}, indent=1) + "\n").encode()})
    return counts


def edges(setup: Setup) -> tuple[float, float]:
    """The smallest and the largest factor on a method's own learning rate that can be reached."""
    return min(setup.rates) * min(setup.refine), max(setup.rates) * max(setup.refine)


def plain(setup: Setup) -> dict[str, Any]:
    """A setup as JSON has it."""
    return dict(json.loads(json.dumps(dataclasses.asdict(setup))))


def full_fits(hall: Hall) -> bool:
    """Whether weights, gradients and Adam's two moments of every parameter fit into four fifths of the free memory."""
    values = sum(one.numel() for one in hall.loaded(0).model.parameters())
    return 16 * values < 0.8 * free_memory()


def free_memory() -> float:
    """Bytes this process could still take; infinite where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf


def timed_run(hall: Hall, entry: Entry, watch: Watcher) -> dict[str, Any] | None:
    """A few steps of a method, for its time; only where a budget in minutes is to be kept."""
    if hall.setup.minutes is None:
        return None
    watch.began(entry, "timing")
    run = hall.trial(entry, steps=TIMED_STEPS)
    watch.ran(entry, "timing", run, [])
    return run


def final_steps(setup: Setup, hall: Hall, entries: Sequence[Entry], timed: Mapping[str, Any]) -> int:
    """Steps of a final run: as asked, one pass over the rows, or what the budget of time allows."""
    steps = setup.steps or hall.steps_of_a_pass()
    if setup.minutes is None:
        return max(steps, FEWEST)
    per_step = overhead = 0.0
    for entry in entries:
        run = timed.get(entry.name)
        if run is None or "problem" in run:
            continue
        each = run["seconds"] / TIMED_STEPS
        runs = setup.seeds - 1 + len(setup.refine) + len(setup.rates) + len(entry.alternatives)
        per_step += each * cost(setup, entry)
        overhead += runs * (run["total_seconds"] - run["seconds"]) * 1.5  # preparing and measuring
    allowed = (60 * setup.minutes - overhead) / max(per_step, 1e-9)
    if allowed < FEWEST:
        needed = (overhead + per_step * FEWEST) / 60
        raise UserError(
            f"compare: {setup.minutes:g} minutes are too few for {len(timed)} methods and {setup.seeds} seeds",
            fix=f"at least {math.ceil(needed)} minutes, or fewer methods or seeds, or a smaller --heldout",
        )
    return int(min(steps, allowed))


def cost_line(setup: Setup, entries: Sequence[Entry], steps: int, timed: Mapping[str, Any]) -> str:
    """What is going to be run, against a full grid."""
    ours = sum(cost(setup, one) for one in entries) * steps
    grid = sum(naive_cost(setup, one) for one in entries) * steps
    sped = [run["seconds"] / TIMED_STEPS for run in timed.values() if run and "problem" not in run]
    clock = f", about {ours * sum(sped) / len(sped) / 60:.0f} min" if sped else ""
    return f"final runs of {steps} steps; {ours:,.0f} steps in all{clock}; a full grid over the same rates: {grid:,.0f}"


def held(
    hall: Hall, entries: Sequence[Entry], steps: int, watch: Watcher, began: float
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """All runs in order: rates first, then seed by seed, so that losers can be left out of the later seeds."""
    chosen: dict[str, tuple[float, Mapping[str, Any]]] = {}
    skipped: dict[str, str] = {}
    watch.stage("learning rates")
    for entry in entries:
        found = chosen_point(hall, entry, steps, watch)
        if isinstance(found, str):
            skipped[entry.name] = found
        else:
            chosen[entry.name] = found
    finals: dict[str, list[dict[str, Any]]] = {}
    for seed in range(hall.setup.seeds):
        watch.stage(f"final runs, seed {seed}")
        for entry in entries:
            if entry.name not in chosen or entry.name in skipped:
                continue
            if seed and not entry.trains and hall.task in ("causal", "seq2seq"):
                continue  # nothing is drawn: every seed is the same
            if seed and (reason := beaten(entry, finals, hall.task)):
                skipped[entry.name] = reason
                watch.note(f"{entry.name}: {reason}")
                continue
            if hall.setup.minutes and seed and time.monotonic() - began > 60 * hall.setup.minutes:
                skipped.setdefault(entry.name, f"time was over before seed {seed}")
                continue
            watch.began(entry, f"seed {seed}")
            factor, settings = chosen[entry.name]
            run = hall.trial(entry, steps=steps, seed=seed, factor=factor, settings=settings, final=True)
            if "problem" in run:
                skipped[entry.name] = run["problem"]
            else:
                finals.setdefault(entry.name, []).append(run)
            watch.ran(entry, f"seed {seed}", run, standings(entries, finals, hall.task))
    return finals, skipped


def chosen_point(hall: Hall, entry: Entry, steps: int, watch: Watcher) -> tuple[float, Mapping[str, Any]] | str:
    """(rate factor, settings) of a method by two rounds, or why it has none."""
    setup = hall.setup
    points: list[tuple[float, Mapping[str, Any]]] = [(factor, {}) for factor in setup.rates]
    points += [(1.0, settings) for settings in entry.alternatives]
    if not entry.trains:
        return 1.0, {}
    best: tuple[float, Mapping[str, Any]] | str = points[0]
    if len(points) > 1:
        short = max(min(steps, SHORTEST), round(FIRST * steps))
        best, _ = best_of(hall, entry, points, {"steps": short}, "first round", watch)
    if isinstance(best, str):
        return best
    points = [(best[0] * other, best[1]) for other in setup.refine]
    best, runs = best_of(hall, entry, points, {"steps": steps, "final": True}, "second round", watch)
    for point, run in runs:
        if point != best and "directory" in run:
            shutil.rmtree(hall.folder / run["directory"], ignore_errors=True)
    return best


def best_of(
    hall: Hall,
    entry: Entry,
    points: Sequence[tuple[float, Mapping[str, Any]]],
    about: Mapping[str, Any],
    stage: str,
    watch: Watcher,
) -> tuple[tuple[float, Mapping[str, Any]] | str, list[tuple[Any, dict[str, Any]]]]:
    """Of some points the one of the lowest loss on the rows that choose, or why none has one; and all runs."""
    runs: list[tuple[Any, dict[str, Any]]] = []
    for factor, settings in points:
        watch.began(entry, stage)
        run = hall.trial(entry, factor=factor, settings=settings, **about)
        watch.ran(entry, stage, run, [])
        runs.append(((factor, settings), run))
        if "problem" in run and "diverge" not in run["problem"]:
            return run["problem"], runs  # it would fail at any rate
    sound = [
        (run["choose"], place) for place, (_, run) in enumerate(runs) if math.isfinite(run.get("choose", math.nan))
    ]
    return (runs[min(sound)[1]][0] if sound else "it diverged at every learning rate"), runs


def beaten(entry: Entry, finals: Mapping[str, Sequence[Mapping[str, Any]]], task: str) -> str | None:
    """Why a method's other seeds are not run: after the first, some contestant is better beyond doubt."""
    own = finals.get(entry.name)
    if entry.kind == "reference" or not own or len(own) > 1:
        return None
    for name, runs in finals.items():
        mine, other = own[0]["judge"], runs[0]["judge"]
        found = difference([mine["losses"]], [other["losses"]], mine["terms"], level=CERTAIN)
        rival = name != entry.name and runs[0]["kind"] == "method"
        if rival and found.low > MARGIN * abs(other["loss"]):
            return f"stopped after one seed: its loss is {found.mean:.3g} above {name}'s, at least {found.low:.3g}"
    return None


def light(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run without its rows."""
    judge = {key: value for key, value in run.get("judge", {}).items() if key in ("loss", "accuracy")}
    return {key: value for key, value in run.items() if key != "judge"} | {"judge": judge}
