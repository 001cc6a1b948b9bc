"""The quality of every registered method at one budget: SST-2 or MRPC on MiniLM-L6, E2E on SmolLM2-135M-Instruct.

    python benchmarks/methods.py --data DIR [--task sst2|mrpc|e2e ...] [--methods GLOB ...] [--minutes N] [--rows N]

DIR holds `glue/SST-2`, `glue/MRPC` and `e2e`. Every method and preset of the registry trains once over the same rows,
at its default sites and settings (but for `SETTINGS`), at each of `--rates` times its default learning rate and, while
the outermost is the best, at up to two beyond it. The two rates of the lowest loss on rows split off the training file
are trained again with a second seed, and the one of the lower mean loss is kept. On E2E, whose runs are long, a third
of the rows chooses the rate, and a lower one is tried where training on all of them does not get below that. Test rows
choose nothing.
References: the model untuned, a trained head alone, and full fine-tuning. Memory is the process's own peak during each
run.

A finished run is a line of `benchmarks/results/methods/<task>.jsonl`: started again, the benchmark goes on behind the
last one, and several processes may share the file, each with other `--methods`. `<task>.json` has the table with its
conditions, `<task>.md` the same to read. With `--rows`, another number of training rows, they are `<task>-<rows>`.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

import trimtab as tt
from trimtab.catalog import attachable, describe, entries, parts_of
from trimtab.compare.runs import forget, peak, trace
from trimtab.core.registry import to_json
from trimtab.data.encode import encode_all
from trimtab.data.encoded import EncodedSet
from trimtab.data.examples import Labelled, PromptCompletion
from trimtab.data.forms import detect, examples
from trimtab.data.labelled import labels_of
from trimtab.data.reading import read
from trimtab.data.splitting import split, take
from trimtab.models.loading import Loaded, load
from trimtab.models.starters import quiet_transformers
from trimtab.train.interrupt import Stopped
from trimtab.train.job import Job
from trimtab.train.prepare import PROBE_RATE, prepare, width_of
from trimtab.train.recipe import recipe_from
from trimtab.train.reporter import Reporter
from trimtab.train.run import train
from trimtab.train.rundir import versions

RESULTS = Path(__file__).parent / "results" / "methods"
SEEDS = (0, 1)
SHORT = -1
"""Stands for the seed of a run over `choosing_rows`; it has the first seed."""
SETTINGS = {"embedding_rows": {"tokens": "0:4096"}}
"""Other settings than the default, where that says nothing of a task: no row has the last tokens of a vocabulary."""
BEYOND = ((0.1, 0.03), (10.0, 30.0))
"""Rates that are tried, one after the other, while the best is the outermost."""


@dataclass(frozen=True)
class Task:
    """Rows and budget of one task."""

    model: str
    train: str
    test: str
    columns: Mapping[str, str]
    measure: str
    """What the table shows: `accuracy`, or `loss` per token."""
    head: str
    """Where the output layer is."""
    rows: int
    chosen_on: int
    """Rows split off the training file to choose the learning rate on."""
    tested_on: int | None
    batch_size: int
    choosing_rows: int | None = None
    """Training rows of a run that only chooses the rate; None: all of them, and the run counts."""

    @property
    def causal(self) -> bool:
        return self.measure == "loss"


TASKS = {
    "sst2": Task(
        *("minilm-l6", "glue/SST-2/train.tsv", "glue/SST-2/dev.tsv", {"text": "sentence", "label": "label"}),
        *("accuracy", "classifier", 1280, 320, None, 16),
    ),
    "mrpc": Task(
        *("minilm-l6", "glue/MRPC/train.tsv", "glue/MRPC/msr_paraphrase_test.txt"),
        *({"text": "#1 String", "pair": "#2 String", "label": "Quality"}, "accuracy", "classifier", 640, 160, 800, 16),
    ),
    "e2e": Task(
        *("smollm2-135m-instruct", "e2e/trainset.csv.gz", "e2e/testset_w_refs.csv"),
        *({"prompt": "mr", "completion": "ref"}, "loss", "head", 192, 16, 48, 8, 64),
    ),
}


@dataclass(frozen=True)
class Entry:
    """What is compared: a name, the recipe keys it stands for, and where its learning rates lie."""

    name: str
    recipe: Mapping[str, Any]
    made: Any
    """The method, or the parts of a preset: only to know the rate and to name the run."""
    kind: str = "method"
    fixed: float | None = None
    """A rate in place of that one: a new head alone wants a larger one."""

    def rate(self, width: int) -> float:
        return self.fixed or float(parts_of(self.made)[0][0].rate(width))


def compared(task: Task, globs: Sequence[str]) -> list[Entry]:
    """The references, and every method and preset of the registry that a glob names; equal ones once."""
    lora, probe = attachable("lora", "methods"), None if task.causal else 5 * PROBE_RATE  # 40 to 80 steps are few
    found = [
        Entry("untuned", {"method": "lora"}, lora, "reference"),
        Entry("head only", {"method": "lora"}, lora, "reference", probe),
        Entry("full fine-tuning", {"method": "full", "where": "all"}, attachable("full", "methods"), "reference"),
    ]
    seen: list[Any] = []
    for name, kind in entries():
        if kind not in ("methods", "presets"):
            continue
        made = attachable(name, kind)
        if made in seen:
            continue
        seen.append(made)
        quantize = "quantize" in describe(name, kind)["needs"]
        recipe = {"method": name} | ({"quantize": "nf4"} if quantize else {})
        recipe |= {"settings": SETTINGS[name]} if name in SETTINGS else {}
        found.append(Entry(name, recipe, made, kind.removesuffix("s"), probe if name == "headonly" else None))
    return [one for one in found if any(fnmatchcase(one.name, glob) for glob in globs)]


# ---------------------------------------------------------------------------------------------------- rows


def write_rows(task: Task, data: Path, folder: Path) -> dict[str, Path]:
    """The training, selection and test rows as files, the same every time; no prompt is on two sides."""
    paths = {}
    table = read(data / task.train)
    own = examples(table, detect(table, task.columns))
    train_rows, chosen_on = split(take(own, 4 * (task.rows + task.chosen_on), 0), task.chosen_on, 0)
    table = read(data / task.test, kind="tsv" if task.test.endswith(".txt") else None)
    tests = examples(table, detect(table, task.columns))
    if task.causal:
        tests = list({row.prompt_key(): row for row in tests}.values())
    parts = {"train": take(train_rows, task.rows, 0), "choose": chosen_on, "test": take(tests, task.tested_on, 0)}
    if task.choosing_rows is not None:
        parts["short"] = take(train_rows, task.choosing_rows, 0)
    for name, rows in parts.items():
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(plain(row)) + "\n" for row in rows), encoding="utf-8")
    return paths


def plain(row: Any) -> dict[str, Any]:
    """A row as the recipe reads it."""
    if isinstance(row, Labelled):
        pair = {} if row.pair is None else {"pair": row.pair}
        return {"text": row.text, **pair, "label": str(row.label)}
    assert isinstance(row, PromptCompletion)
    return {"prompt": row.prompt, "completion": row.completion}


# ---------------------------------------------------------------------------------------------------- runs


class Bench:
    """One task: its rows, its model in memory, and the runs that are on file."""

    def __init__(self, name: str, task: Task, data: Path, folder: Path) -> None:
        self.name, self.task, self.folder = name, task, folder
        self.paths = write_rows(task, data, folder)
        contents = [self.paths[part].read_bytes() for part in ("train", "choose", "test")]
        self.rows = hashlib.sha256(b"\0".join(contents)).hexdigest()[:16]
        self.log = RESULTS / f"{name}.jsonl"
        self.loaded: dict[int, tuple[Loaded, float]] = {}

    def done(self) -> dict[str, dict[str, Any]]:
        """The finished runs by key; a line that a kill cut short is passed over."""
        found = {}
        for line in self.log.read_text(encoding="utf-8").splitlines() if self.log.is_file() else []:
            try:
                run = json.loads(line)
                found[run["key"]] = run
            except (ValueError, KeyError):
                continue
        return found

    def key(self, entry: Entry, factor: float, seed: int) -> str:
        """What makes a run this run: rows, budget, method with its settings, rate and seed."""
        task = {
            name: value for name, value in asdict(self.task).items() if value is not None or name != "choosing_rows"
        }
        about = [task, self.rows, entry.name, dict(entry.recipe), to_json(entry.made), entry.fixed]
        about += [factor, seed]
        return hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()[:16]

    def model(self, seed: int) -> Loaded:
        """The model with the head of a seed, loaded once; loaded again if a run has left something behind."""
        known = self.loaded.get(seed)
        if known is not None and trace(known[0].model) != known[1]:
            raise SystemExit(f"a run changed the frozen weights of {self.task.model}")
        if known is None:
            self.loaded.clear()
            gc.collect()
            rows = read(self.paths["train"])
            task = "causal" if self.task.causal else "classify"
            names = None if self.task.causal else [str(one) for one in labels_of(examples(rows, detect(rows, None)))]  # type: ignore[arg-type]
            with quiet_transformers():
                made = load(self.task.model, task=task, labels=names, dtype="float32", device="cpu", head_seed=seed)
            known = self.loaded[seed] = (made, trace(made.model))
        return known[0]

    def job(self, entry: Entry, rate: float | None, seed: int) -> Job:
        """A run, prepared."""
        short, seed = seed == SHORT, drawn_from(seed)
        recipe = recipe_from(
            {
                **entry.recipe,
                "model": self.task.model,
                "data": str(self.paths["short" if short else "train"]),
                "heldout": str(self.paths["choose"]),
                "batch_size": self.task.batch_size,
                "learning_rate": rate,
                "save_every": 0,
                "seed": seed,
                "threads": torch.get_num_threads(),
                "truncation": "right",
            }
        )
        job = prepare(recipe, Reporter(), Path(tempfile.mkdtemp(dir=self.folder)), loaded=self.model(seed))
        if entry.name != "head only":
            return job
        tt.detach(job.model)
        tt.attach(job.model, tt.Full(), self.task.head, seed=seed)
        return replace(job, seam=None, packing="off") if self.task.causal else job

    def run(self, entry: Entry, factor: float, seed: int, best: float) -> dict[str, Any]:
        """Train and measure; the test rows only where the loss on the selection rows is below `best`."""
        began = time.perf_counter()
        forget()
        found: dict[str, Any] = {"key": self.key(entry, factor, seed), "name": entry.name, "kind": entry.kind}
        found |= {"factor": factor, "seed": seed}
        clean = False
        try:
            loaded = self.model(drawn_from(seed))
            rate = entry.rate(width_of(loaded.model)) * factor
            job = self.job(entry, rate, seed)
            found |= {"rate": rate, "sites": sum(part["sites"] for part in job.record["method"]), "where": place(job)}
            found["trainable"] = sum(one.numel() for one in job.model.parameters() if one.requires_grad)
            found["total"] = sum(one.numel() for one in loaded.model.parameters()) - found["trainable"]
            with job.running():
                if entry.name == "untuned":
                    tt.activate(job.model, None)
                else:
                    lines = train(job, Reporter())
                    found |= {"steps": len(lines), "last_loss": lines[-1]["loss"], "seconds": lines[-1]["seconds"]}
                found["choose"] = job.measure()
                if found["choose"]["loss"] < best:
                    found["test"] = replace(job, heldout_rows=self.tests(job)).measure()
            tt.detach(job.model).eval()
            clean = not job.recipe.quantize
        except tt.UserError as problem:
            found["problem"] = problem.message
        except Exception as fault:
            found["problem"] = f"{type(fault).__name__}: {fault}"
        if not clean:
            self.loaded.pop(drawn_from(seed), None)
        found |= {"peak_bytes": peak(), "total_seconds": round(time.perf_counter() - began, 2)}
        return found

    def tests(self, job: Job) -> EncodedSet:
        """The test rows as token ids, with the labels of the training rows."""
        table = read(self.paths["test"])
        rows = examples(table, detect(table, None))
        tokenizer = self.loaded[job.recipe.seed][0].tokenizer
        return encode_all(rows, tokenizer, max_length=512, truncation="right", labels=job.train_rows.labels)

    def write(self, run: Mapping[str, Any]) -> None:
        """One line, whole, at the end of the file."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "a", encoding="utf-8") as out:
            out.write(json.dumps(run) + "\n")
            out.flush()
            os.fsync(out.fileno())


def drawn_from(seed: int) -> int:
    """The seed that a run is drawn from."""
    return SEEDS[0] if seed == SHORT else seed


def place(job: Job) -> str:
    """Where the method went."""
    return ", ".join(part["where"] for part in job.record["method"])


Runs = Mapping[tuple[float, int], Mapping[str, Any]]
"""Runs of one entry by factor and seed."""


def plan(entry: Entry, factors: Sequence[float], known: Runs, short: bool) -> Iterator[tuple[float, int]]:
    """The runs of one entry in order: every rate with the first seed, further ones while the best is the outermost,
    then the two best with the second; at last the kept one again where its test rows were passed over. With `short`
    the rates are tried over fewer rows, and the best of them, or a lower one, goes through all rows with both seeds."""
    if entry.name == "untuned":
        yield from ((1.0, seed) for seed in SEEDS)
        return
    first = SHORT if short else SEEDS[0]
    yield from ((factor, first) for factor in factors)
    if len(factors) > 1:
        for _ in BEYOND[0]:
            further = next_rate(known)
            if further is None:
                break
            yield further, first
    if short:
        yield from whole_runs(known)
        return
    for factor in ranked(known)[:2]:
        yield factor, SEEDS[1]
    kept = chosen(known)
    if kept is not None and "test" not in known[kept, SEEDS[0]]:
        yield kept, SEEDS[0]


def whole_runs(known: Runs) -> Iterator[tuple[float, int]]:
    """The best rate over all rows, a lower one if that left a higher loss than fewer rows did; the kept, both seeds."""
    order = ranked(known)
    if not order:
        return
    for factor in [one for one in order if one <= order[0]][:2]:
        yield factor, SEEDS[0]
        if loss_on_choice(known[factor, SEEDS[0]]) < loss_on_choice(known[order[0], SHORT]):
            break
    kept = chosen(known)
    if kept is not None:
        yield kept, SEEDS[1]


def next_rate(known: Runs) -> float | None:
    """Where the best of the rates tried is the outermost, the next one beyond it."""
    tried, order = sorted({factor for factor, _ in known}), ranked(known)
    below, above = BEYOND
    if not order:
        return None
    if order[0] == tried[-1]:
        return next((one for one in above if one > tried[-1]), None)
    if order[0] == tried[0]:
        return next((one for one in below if one < tried[0]), None)
    return None


def ranked(known: Runs, seed: int | None = None) -> list[float]:
    """The rates by the loss on the selection rows, of short runs where there are any and else of the first seed; those
    that failed left out."""
    if seed is None:
        seed = SHORT if any(one == SHORT for _, one in known) else SEEDS[0]
    losses = {factor: loss_on_choice(run) for (factor, of), run in known.items() if of == seed}
    return sorted((one for one, loss in losses.items() if loss < float("inf")), key=lambda one: losses[one])


def chosen(known: Runs) -> float | None:
    """The rate of the lowest loss on the selection rows, in the mean of the seeds where any rate has both."""
    order = ranked(known, SEEDS[0])
    both = [one for one in order if (one, SEEDS[1]) in known]
    both = [one for one in both if loss_on_choice(known[one, SEEDS[1]]) < float("inf")]
    if not both:
        return order[0] if order else None
    return min(both, key=lambda one: sum(loss_on_choice(known[one, seed]) for seed in SEEDS))


def loss_on_choice(run: Mapping[str, Any]) -> float:
    """The loss on the selection rows; infinite for a run that failed."""
    found = float("inf") if "problem" in run else float(run["choose"]["loss"])
    return found if found == found else float("inf")


def carry_out(bench: Bench, listed: Sequence[Entry], factors: Sequence[float], until: float) -> bool:
    """All runs that are not on file yet, while there is time; whether there was time for all."""
    known, longest = bench.done(), 0.0
    factors = sorted(factors, key=lambda factor: abs(factor - 1))
    for entry in listed:
        runs: dict[tuple[float, int], Mapping[str, Any]] = {}
        for factor, seed in plan(entry, factors, runs, bench.task.choosing_rows is not None):
            key, again = bench.key(entry, factor, seed), (factor, seed) in runs
            run = known.get(key)
            if run is None or again:
                if time.monotonic() + longest > until:
                    return False
                rivals = [loss_on_choice(run) for (_, of), run in runs.items() if of == seed == SEEDS[0] and not again]
                best = -math.inf if seed == SHORT else min(rivals, default=math.inf)
                run = bench.run(entry, factor, seed, best)
                bench.write(run)
                longest = max(longest, run["total_seconds"])
                told = run.get("problem") or {name: run[name] for name in ("rate", "choose", "test") if name in run}
                print(f"{bench.name} {entry.name} x{factor:g} seed {seed}: {told} {run['total_seconds']} s", flush=True)
            runs[factor, seed] = run
    return True


# --------------------------------------------------------------------------------------------------- table


def table(bench: Bench, listed: Sequence[Entry], factors: Sequence[float]) -> list[dict[str, Any]]:
    """A row for every entry that has runs on file: scores of both seeds, their mean, what it cost."""
    known, task = bench.done(), bench.task
    rows = []
    for entry in listed:
        tried = [1.0] if entry.name == "untuned" else [*factors, *BEYOND[0], *BEYOND[1]]
        seeds = SEEDS if task.choosing_rows is None else (*SEEDS, SHORT)
        keys = {(factor, seed): bench.key(entry, factor, seed) for factor in tried for seed in seeds}
        runs = {at: known[key] for at, key in keys.items() if key in known}
        first = sorted({factor for factor, seed in runs if seed != SEEDS[1]})
        if not first:
            continue
        best = chosen(runs)
        row: dict[str, Any] = {"name": entry.name, "kind": entry.kind, "rates_tried": first}
        if best is None:
            problems = [run["problem"] for run in runs.values() if "problem" in run]
            rows.extend(row | {"problem": problem} for problem in problems[:1])
            continue
        kept = runs[best, SEEDS[0]]
        shown = [runs[best, seed] for seed in SEEDS if "test" in runs.get((best, seed), {})]
        if not shown:
            continue
        scores = [run["test"][task.measure] for run in shown]
        row |= {"where": kept["where"], "rate": kept["rate"], "factor": kept["factor"], "scores": scores}
        row |= {"mean": sum(scores) / len(scores), "trainable": kept["trainable"], "total": kept["total"]}
        row |= {"seconds": kept.get("seconds"), "peak_bytes": max(run["peak_bytes"] or 0 for run in shown)}
        row["by_both_seeds"] = sum(seed == SEEDS[1] for _, seed in runs) > 1 or len(first) == 1
        row["by_short_runs"] = any(seed == SHORT for _, seed in runs)
        row["edge"] = len(first) > 1 and kept["factor"] in (min(first), max(first))
        rows.append(row)
    head = next((row for row in rows if row["name"] == "head only" and "scores" in row), None)
    for row in rows:
        if head is not None and "scores" in row and row["kind"] != "reference":
            whole = len(row["scores"]) == len(head["scores"]) == len(SEEDS)
            row["beats_head"] = beats(row["scores"], head["scores"], higher=not task.causal) if whole else None
    return rows


def beats(scores: Sequence[float], others: Sequence[float], higher: bool) -> bool:
    """Whether the worse seed is better than the better seed of the others."""
    sign = 1 if higher else -1
    return min(sign * one for one in scores) > max(sign * one for one in others)


def markdown(bench: Bench, rows: Sequence[Mapping[str, Any]], conditions: Mapping[str, Any]) -> str:
    """The table to read, best first, references on top."""
    task, higher = bench.task, not bench.task.causal
    scored = [row for row in rows if "scores" in row]
    order = sorted(scored, key=lambda row: (row["kind"] != "reference", -row["mean"] if higher else row["mean"]))
    lines = [
        f"# {bench.name} on {task.model}",
        "",
        f"{task.rows} training rows, one epoch in batches of {task.batch_size}; {task.measure} on "
        f"{conditions['test_rows']} test rows, seeds {SEEDS[0]} and {SEEDS[1]}. The learning rate is the one of the "
        f"lowest loss on {task.chosen_on} other training rows, among {conditions['rates']} times the default and up to "
        f"two beyond it where the outermost was best: {choice(task)}. "
        f"{conditions['machine']}, {conditions['threads']} thread, torch {conditions['versions']['torch']}, float32. "
        f"Settings other than the defaults: {json.dumps(SETTINGS)}. Written by `benchmarks/methods.py`.",
        "",
        f"| method | {task.measure}, mean | seed 0 | seed 1 | learning rate | trained | share | time | peak | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in order:
        second = f"{row['scores'][1]:.4f}" if len(row["scores"]) > 1 else "-"
        remarks = ["not clearly better than the head alone"] if row.get("beats_head") is False else []
        remarks += ["one seed only"] if len(row["scores"]) < len(SEEDS) else []
        remarks += [] if row["by_both_seeds"] or row["by_short_runs"] else ["rate chosen with one seed"]
        remarks += ["best at the edge of the rates"] if row["edge"] and row["kind"] != "reference" else []
        time_taken = "-" if row["seconds"] is None else f"{row['seconds']:.1f} s"
        untuned = row["name"] == "untuned"
        cost = ["-", "-", "-"]
        if not untuned:
            cost = [f"{row['rate']:.1e} (x{row['factor']:g})", f"{row['trainable']:,}"]
            cost.append(f"{row['trainable'] / row['total']:.2%}")
        cells = [row["name"], f"{row['mean']:.4f}", f"{row['scores'][0]:.4f}", second, *cost, time_taken]
        lines.append("| " + " | ".join([*cells, f"{row['peak_bytes'] / 1e9:.2f} GB", "; ".join(remarks)]) + " |")
    lost = [f"- {row['name']}: {row['problem']}" for row in rows if "problem" in row]
    return "\n".join([*lines, *(["", "Without a score:", "", *lost] if lost else [])]) + "\n"


def choice(task: Task) -> str:
    """How the rate was chosen among those tried, in words."""
    if task.choosing_rows is None:
        return "of the two best with one seed, the better in the mean of both"
    return (
        f"with one seed and the first {task.choosing_rows} rows, or the next best lower one where all rows did not get "
        "below what those gave"
    )


def publish(bench: Bench, listed: Sequence[Entry], factors: Sequence[float]) -> None:
    """Write the table and its conditions from the runs on file."""
    rows = table(bench, listed, factors)
    conditions = {
        "versions": versions(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "precision": "float32",
        "seeds": list(SEEDS),
        "rates": sorted(factors),
        "rows_sha256": bench.rows,
        "test_rows": len(read(bench.paths["test"]).rows),
        "task": asdict(bench.task),
        "note": "the models are trimtab's starters; SmolLM2 is dequantized from Q4_1, not the original",
    }
    found = {"conditions": conditions, "rows": rows}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{bench.name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{bench.name}.md").write_text(markdown(bench, rows, conditions), encoding="utf-8")


def main() -> None:
    """Run what was asked for, as far as the time goes, and write the tables of everything on file."""
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--data", type=Path, required=True)
    reader.add_argument("--task", nargs="+", choices=list(TASKS), default=["sst2", "e2e"])
    reader.add_argument("--methods", nargs="+", default=["*"], metavar="GLOB")
    reader.add_argument("--rates", type=float, nargs="+", default=[0.3, 1.0, 3.0], help="times the default")
    reader.add_argument("--minutes", type=float, default=60.0, help="for all tasks together")
    reader.add_argument("--rows", type=int, help="training rows, in place of the task's own")
    asked = reader.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    until = time.monotonic() + 60 * asked.minutes
    complete = True
    for name in asked.task:
        task = replace(TASKS[name], rows=asked.rows) if asked.rows else TASKS[name]
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(f"{name}-{asked.rows}" if asked.rows else name, task, asked.data, Path(folder))
            try:
                complete &= carry_out(bench, compared(task, asked.methods), asked.rates, until)
            except Stopped:
                complete = False
                until = time.monotonic()
            publish(bench, compared(task, ["*"]), asked.rates)
            print((RESULTS / f"{bench.name}.md").read_text(encoding="utf-8"))
    if not complete:
        sys.exit("not all is done; start again to go on")


if __name__ == "__main__":
    main()
