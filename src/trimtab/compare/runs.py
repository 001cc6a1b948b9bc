"""One model in memory, many runs over it: each is prepared, trained, measured and taken off again without a trace."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trimtab.compare.setup import PARTS, Entry, Setup, key_of
from trimtab.core.attach import detach
from trimtab.core.errors import UserError
from trimtab.core.files import sha256_of
from trimtab.data.encoded import EncodedSet
from trimtab.data.examples import Example, PromptCompletion
from trimtab.data.forms import detect, examples
from trimtab.data.reading import read
from trimtab.data.splitting import take
from trimtab.data.wording import inference_prompt
from trimtab.evaluate.reference import BUILT_IN, NONE, reference_loss
from trimtab.evaluate.rows import RowScores, each_row
from trimtab.models.loading import Loaded, load
from trimtab.models.starters import quiet_transformers
from trimtab.models.tasks import writing_task
from trimtab.train import rundir
from trimtab.train.job import Job
from trimtab.train.prepare import prepare
from trimtab.train.recipe import Recipe, recipe_from
from trimtab.train.reporter import Reporter
from trimtab.train.rows import encoded, label_names, task_of
from trimtab.train.run import carry_out, train

RESULTS, RUNS, ROWS = "results.jsonl", "runs", "rows"
SHOTS = 4
SAMPLES = 3
SAMPLE_TOKENS = 64


class Journal:
    """The finished runs of a directory, one JSON line each, written whole: what a second call does not repeat."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, dict[str, Any]] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                run = json.loads(line)
                self.known[run["key"]] = run
            except (ValueError, KeyError, TypeError):
                continue  # the line a kill cut short

    def add(self, run: dict[str, Any]) -> None:
        """Write one line to the disk; a line cut short before it is closed first."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        broken = self.path.is_file() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size
        with open(self.path, "a", encoding="utf-8") as out:
            out.write(("\n" if broken else "") + json.dumps(run) + "\n")
            out.flush()
            os.fsync(out.fileno())
        self.known[run["key"]] = run


class Hall:
    """Where a contest is held: its rows, its model, its runs on file."""

    def __init__(self, setup: Setup, folder: Path) -> None:
        self.setup, self.folder = setup, folder
        self.paths = {name: folder / ROWS / f"{name}.jsonl" for name in PARTS}
        self.journal = Journal(folder / RESULTS)
        self.rows = "-".join(sha256_of(self.paths[name])[:8] for name in PARTS)
        self.examples = {name: rows_in(path, setup.columns) for name, path in self.paths.items()}
        self.task = self._task()
        self._loaded: tuple[int, Loaded, float] | None = None
        self._judged: EncodedSet | None = None

    def _task(self) -> str:
        table = read(self.paths["train"])
        form = detect(table, self.setup.columns or None)
        task = task_of(self.recipe({"method": "lora"}, 0), form.name, form.target)
        return writing_task(self.setup.model) if task == "causal" else task

    def recipe(self, about: Mapping[str, Any], seed: int, steps: int | None = None) -> Recipe:
        """A recipe on the contest's rows."""
        setup = self.setup
        values = {
            "model": setup.model,
            "data": str(self.paths["train"]),
            "heldout": str(self.paths["choose"]),
            "columns": dict(setup.columns),
            "batch_size": setup.batch_size,
            "max_length": setup.max_length,
            "truncation": "right",
            "dtype": setup.dtype,
            "device": setup.device,
            "threads": setup.threads,
            "save_every": 0,
            "seed": setup.seed + seed,
            "steps": steps,
        }
        return recipe_from({**values, **about})

    def loaded(self, seed: int) -> Loaded:
        """The model, with the new head of a seed where it gets one; loaded again if a run has left something behind."""
        head = seed if self.task in ("classify", "regress") else 0
        if self._loaded is not None and self._loaded[0] == head and trace(self._loaded[1].model) == self._loaded[2]:
            return self._loaded[1]
        self._loaded = None
        gc.collect()
        with quiet_transformers():
            made = load(
                self.setup.model,
                task=self.task,
                labels=label_names(self.examples["train"]) if self.task == "classify" else None,
                dtype=self.setup.dtype,
                device=self.setup.device,
                head_seed=self.setup.seed + head,
            )
        self._loaded = (head, made, trace(made.model))
        return made

    def steps_of_a_pass(self) -> int:
        """Optimizer steps of one pass over the training rows."""
        return math.ceil(len(self.examples["train"]) / self.setup.batch_size)

    # -------------------------------------------------------------------------------------------------- runs

    def trial(
        self, entry: Entry, *, steps: int, seed: int = 0, factor: float = 1.0, settings: Any = None, final: bool = False
    ) -> dict[str, Any]:
        """One run: from the file if it is on it, else carried out and written there.

        A final run leaves a run directory and is judged row by row; the others only have their loss on the rows that
        choose. A run that fails has its `problem` in place of figures.
        """
        settings = dict(settings or {})
        about = {"steps": steps, "seed": seed, "factor": factor, "settings": settings, "final": final}
        key = key_of(self.setup, self.rows, entry, about)
        known = self.journal.known.get(key)
        if known is not None:
            return known
        began, run = time.perf_counter(), {"key": key, "name": entry.name, "kind": entry.kind, **about}
        clean = False
        try:
            loaded = self.loaded(seed)
            forget()
            run |= self._run(entry, loaded, run)
            if entry.trains:
                detach(loaded.model).eval()
            clean = run.get("in_place", True)
        except UserError as problem:
            run["problem"] = problem.message
        except (RuntimeError, ValueError, TypeError, MemoryError) as fault:
            run["problem"] = f"{type(fault).__name__}: {str(fault).splitlines()[0] if str(fault) else ''}"
        if not clean:
            self._loaded = None
        run |= {"peak_bytes": run.get("peak_bytes") or peak(), "total_seconds": round(time.perf_counter() - began, 3)}
        self.journal.add(run)
        return run

    def _run(self, entry: Entry, loaded: Loaded, run: Mapping[str, Any]) -> dict[str, Any]:
        if entry.name == "untuned":
            return self._judgement(loaded.model, loaded, self.judged(loaded))
        if entry.name == "few-shot":
            return {"judge": told(self.scored(loaded.model, loaded, self.few_shot(loaded)))}
        seed, final = run["seed"], run["final"]
        recipe = self.recipe({**entry.recipe, **run["settings"]}, seed, steps=run["steps"])
        stem = "-".join(
            [file_name(entry.name), f"x{run['factor']:g}", *map(str, run["settings"].values()), f"seed{seed}"]
        )
        target = self.folder / RUNS / file_name(stem) if final else None
        if target is not None:
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
        directory = target or Path(tempfile.mkdtemp(dir=self.folder, prefix=".trial-"))
        try:
            job = prepare(recipe, Reporter(), directory, loaded=loaded)
            job = at_rate(job, job.rate * run["factor"])
            return self._trained(job, loaded, final) | {"in_place": not job.recipe.quantize}
        finally:
            if target is None:
                shutil.rmtree(directory, ignore_errors=True)

    def _trained(self, job: Job, loaded: Loaded, final: bool) -> dict[str, Any]:
        """Train, measure; a final run is saved and judged."""
        found: dict[str, Any] = {"rate": job.rate, "trainable": job.record["trainable"]}
        found["sites"] = sum(part["sites"] for part in job.record["method"])
        if not final:
            with job.running():
                lines = train(job, Reporter())
                return found | figures(lines) | {"choose": job.measure()["loss"]}
        result = carry_out(job, Reporter())
        found["peak_bytes"] = peak()  # of training and its own measuring, before the rows that judge
        lines = [json.loads(one) for one in (job.directory / rundir.METRICS).read_text(encoding="utf-8").splitlines()]
        found |= figures(lines) | {
            "choose": result.after["loss"],
            "directory": str(job.directory.relative_to(self.folder)),
        }
        found["predicted_bytes"] = foretold(job.record.get("memory", {}))
        found["curve"] = thinned([(line["step"], line["loss"]) for line in lines])
        found["saved_bytes"] = sum(one.stat().st_size for one in (job.directory / rundir.ADAPTER).iterdir())
        return found | self._judgement(job.model, loaded, self.judged(loaded))

    def scored(self, model: Any, loaded: Loaded, rows: EncodedSet) -> RowScores:
        """The score of every row."""
        return each_row(model, rows, self.task, pad_of(loaded), batch_size=self.setup.batch_size)

    def _judgement(self, model: Any, loaded: Loaded, rows: EncodedSet) -> dict[str, Any]:
        found: dict[str, Any] = {"judge": told(self.scored(model, loaded, rows))}
        if self.forgets():
            asked = self.setup.reference_text
            found["reference_loss"] = reference_loss(model, loaded.tokenizer, asked, batch_size=self.setup.batch_size)
        if self.task == "causal":
            found["samples"] = self.samples(model, loaded)
        return found

    # -------------------------------------------------------------------------------------------------- rows

    def judged(self, loaded: Loaded) -> EncodedSet:
        """The rows that judge, as token ids."""
        if self._judged is None:
            both = self.examples["train"], self.examples["judge"]
            self._judged = encoded(self.recipe({"method": "lora"}, 0), loaded, *both)[1]
        return self._judged

    def few_shot(self, loaded: Loaded) -> EncodedSet:
        """The rows that judge, each behind a few training rows."""
        shown = take(
            [one for one in self.examples["train"] if isinstance(one, PromptCompletion)], SHOTS, self.setup.seed
        )
        judge = [one for one in self.examples["judge"] if isinstance(one, PromptCompletion)]
        if len(judge) < len(self.examples["judge"]) or not shown:
            raise UserError("few-shot prompting needs rows of prompt and completion")
        before = "\n\n".join(f"{one.prompt}\n{one.completion}" for one in shown)
        rows = [replace(one, prompt=f"{before}\n\n{one.prompt}") for one in judge]
        return encoded(self.recipe({"method": "lora"}, 0), loaded, self.examples["train"], rows)[1]

    def forgets(self) -> bool:
        """Whether forgetting is measured: a model for another task than writing has no loss on a text."""
        asked = self.setup.reference_text
        if asked not in (BUILT_IN, NONE) and self.task != "causal":
            raise UserError(f"compare: forgetting is the loss of a text, which a model for {self.task} does not have")
        return asked != NONE and self.task == "causal"

    def samples(self, model: Any, loaded: Loaded) -> list[dict[str, str]]:
        """What the model answers to the first rows that judge."""
        from trimtab.evaluate.generate import generate

        chosen = [one for one in self.examples["judge"] if isinstance(one, PromptCompletion)][:SAMPLES]
        if not chosen:
            return []
        prompts = [inference_prompt(one, loaded.tokenizer, encoder=self.task == "seq2seq") for one in chosen]
        answers = generate(model, loaded.tokenizer, prompts, SAMPLE_TOKENS)
        return [
            {"prompt": one.prompt, "wanted": one.completion, "answer": answer}
            for one, answer in zip(chosen, answers, strict=True)
        ]


def rows_in(path: Path, columns: Mapping[str, str]) -> list[Example]:
    """The examples of one part."""
    table = read(path)
    return examples(table, detect(table, columns or None))


def foretold(memory: Mapping[str, Any]) -> int | None:
    """The predicted peak of a run whose model is in memory already: without what loading it takes."""
    whole: int | None = memory.get("predicted_bytes")
    return whole and whole - memory["predicted"].get("loading", 0)


def at_rate(job: Job, rate: float) -> Job:
    """The same job at another learning rate, which its recipe then names."""
    rate = float(f"{rate:.3g}")
    return replace(
        job,
        rate=rate,
        recipe=dataclasses.replace(job.recipe, learning_rate=rate),
        record=job.record | {"learning_rate": rate},
    )


def figures(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the metrics of a run come to."""
    return {
        "seconds": lines[-1]["seconds"],
        "rows_per_second": lines[-1]["rows_per_second"],
        "last_loss": lines[-1]["loss"],
    }


def thinned(points: Sequence[tuple[int, float]], most: int = 120) -> list[tuple[int, float]]:
    """At most so many points of a curve, the last one among them."""
    gap = max(1, math.ceil(len(points) / most))
    return [(step, round(loss, 5)) for step, loss in points if step % gap == 0 or step == points[-1][0]]


def told(scores: RowScores) -> dict[str, Any]:
    """Scores as plain data."""
    found: dict[str, Any] = {
        "loss": scores.loss,
        "losses": [round(one, 6) for one in scores.losses],
        "terms": scores.terms,
    }
    return found if scores.right is None else found | {"accuracy": scores.accuracy, "right": scores.right}


def pad_of(loaded: Loaded) -> int:
    """The token id rows are padded with."""
    return int(loaded.tokenizer.pad_token_id)


def file_name(name: str) -> str:
    """A contestant's name as part of a path."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name)


def trace(model: Any) -> float:
    """A number that changes when a weight does."""
    return float(sum(one.detach().sum(dtype=torch.float64) for one in model.parameters()))


def forget() -> None:
    """Give back what earlier runs left on the heap, and begin the peak memory of the process anew where that can be."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return


def peak() -> int | None:
    """Peak resident bytes since `forget`, or of the whole process where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return rundir.peak_memory()
