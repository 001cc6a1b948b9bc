"""Peak memory of a training step: measured by category and as a process, beside what was predicted.

    python benchmarks/memory/table.py [--models smollm2-135m-instruct,minilm-l6] [--methods 'lora;full'] [--points 8x64]
                                      [--no-lengths] [--steps 3] [--again] [--predict]
                                      [--out benchmarks/results/memory.json]

Every cell is two processes of their own: one runs `tune` and reports its peak resident set, one runs the same steps
under `trimtab.plan.live.Live`, which counts living tensors by category. Rows are made of common words, all of one
length, and a point that is longer than a model reads has as many tokens in more rows. fp32 throughout. LISA and BAdam
change what trains at every second step, so that both a state and a switch are in the three. A cell that is
in the result file already is not run again, nor one that is refused (with `--again` it is); one that failed is. With
`--predict` nothing is measured: what is on file stays, and is predicted anew by the code as it is.
Writes the JSON and, beside it, a Markdown table with the sign of every error, each as a whole or not at all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

RESULTS = Path(__file__).resolve().parent.parent / "results"
MODELS = ("smollm2-135m-instruct", "minilm-l6")
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "rank": 16, "where": "all-linear"},
    "qlora": {"method": "lora", "rank": 16, "where": "all-linear", "quantize": "nf4-double"},
    "adapters": {"method": "houlsby"},
    "bitfit": {"method": "bit_fit"},
    "lisa": {"method": "full", "active": "lisa", "active_every": 2},
    "galore": {"method": "full", "optimizer": "galore"},
    "lomo": {"method": "full", "optimizer": "lomo"},
    "badam": {"method": "full", "active": "badam", "active_outside": True, "active_every": 2},
    "apollo": {"method": "full", "optimizer": "apollo"},
    "peqa": {"method": "peqa"},
    "lora, checkpointed": {"method": "lora", "rank": 16, "where": "all-linear", "checkpointing": "block"},
    "lora, selective": {"method": "lora", "rank": 16, "where": "all-linear", "checkpointing": "selective"},
}
POINTS = ((8, 64), (4, 256), (1, 1024))
LENGTHS = (64, 128, 256, 512, 1024, 2048)
LIMITS = {"minilm-l6": 512}
WORDS = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they".split()
)
CATEGORIES = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "temporary")


def cells(
    models: list[str], methods: list[str], points: list[tuple[int, int]], lengths: bool
) -> Iterator[dict[str, Any]]:
    """Every measurement: methods at the points, then LoRA over lengths."""
    for model in models:
        for name in methods:
            for rows, length in dict.fromkeys(fitted(model, *point) for point in points):
                yield {"model": model, "name": name, "rows": rows, "length": length}
        for length in LENGTHS if lengths else ():
            if length <= LIMITS.get(model, length):
                yield {"model": model, "name": "lora", "rows": 1, "length": length}


def fitted(model: str, rows: int, length: int) -> tuple[int, int]:
    """A point with rows no longer than the model reads, and as many tokens in all."""
    longest = min(length, LIMITS.get(model, length))
    return rows * length // longest, longest


def is_done(found: dict[str, Any] | None, again: bool) -> bool:
    """Whether a cell need not be run: it was measured, or refused and no second try is asked for."""
    return found is not None and ("live" in found or ("skipped" in found and not again))


def key_of(cell: dict[str, Any]) -> str:
    """The name of a cell in the result file."""
    return f"{cell['model']} | {cell['name']} | {cell['rows']}x{cell['length']}"


def write_rows(path: Path, labelled: bool, count: int, length: int) -> None:
    """Rows that all reach the length."""
    draw = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for row in range(count):
            text = " ".join(draw.choice(WORDS) for _ in range(length + 8))
            file.write(json.dumps({"text": text, **({"label": ["bad", "good"][row % 2]} if labelled else {})}) + "\n")


def recipe_of(cell: dict[str, Any], folder: Path, steps: int) -> Any:
    """The recipe of a cell, on rows made for it."""
    from trimtab.train.recipe import recipe_from

    data = folder / "rows.jsonl"
    count = max(cell["rows"] * steps + 4, 16)  # of both labels on either side of the split
    write_rows(data, cell["model"].startswith("minilm"), count, cell["length"])
    values = {
        "model": cell["model"],
        "data": str(data),
        "batch_size": cell["rows"],
        "max_length": cell["length"],
        "truncation": "right",
        "train_on": "all",
        "heldout": "4",
        "steps": steps,
        "dtype": "float32",
        "save_every": 0,
        "output": str(folder / "run"),
    }
    return recipe_from(values | METHODS[cell["name"]])


def as_process(cell: dict[str, Any], steps: int) -> dict[str, Any]:
    """The peak resident set of `tune`, and what it had predicted."""
    from trimtab.train.run import tune

    with tempfile.TemporaryDirectory() as folder:
        return {"memory": tune(recipe_of(cell, Path(folder), steps)).record["memory"]}


def foretold(cell: dict[str, Any], steps: int) -> dict[str, Any]:
    """What is predicted for the process now."""
    from trimtab.plan.of_run import predicted
    from trimtab.train.prepare import prepare
    from trimtab.train.reporter import Reporter

    with tempfile.TemporaryDirectory() as folder:
        return predicted(prepare(recipe_of(cell, Path(folder), steps), Reporter()))


def by_category(cell: dict[str, Any], steps: int) -> dict[str, Any]:
    """Living tensors of real steps by category, at the highest point after the first step."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from trimtab.core.transform import flat
    from trimtab.plan.dry_run import gradients_named, loss_named, tensors_of
    from trimtab.plan.live import Live
    from trimtab.train import run
    from trimtab.train.reporter import Reporter

    live, plain = Live(), run.loss_sum

    def forward(*args: Any) -> Any:
        with live.during("activations"):
            return plain(*args)

    def stepped(optimizer: Any, *_: Any) -> None:
        for state in optimizer.state.values():
            live.declare(flat(state).values(), "optimizer")

    class FromSecond(Reporter):
        def step(self, metrics: Any) -> None:
            if metrics["step"] == 1:
                live.forget_peak()

    with tempfile.TemporaryDirectory() as folder:
        job = run.prepare(recipe_of(cell, Path(folder), steps), Reporter())
        job.directory.mkdir(parents=True)
        trained = [p for p in job.model.parameters() if p.requires_grad]
        known = {id(p) for p in trained}
        live.declare((one for one in tensors_of(job.model) if id(one) not in known), "weights")
        live.declare(trained, "adapter")
        handles = [*gradients_named(trained, live), register_optimizer_step_post_hook(stepped)]
        with job.running(), mock.patch.object(run, "loss_sum", forward), loss_named(live), live:
            run.train(job, FromSecond())
        for handle in handles:
            handle.remove()
    return {"live": dict(live.at_peak)}


def measured(cell: dict[str, Any], steps: int) -> dict[str, Any]:
    """Both measurements, each in a process of its own."""
    found: dict[str, Any] = dict(cell)
    for kind in ("process", "category"):
        command = [sys.executable, __file__, "--cell", json.dumps(cell), "--kind", kind, "--steps", str(steps)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            told = [line for line in done.stderr.splitlines() if "Error:" in line]
            if told and "UserError:" in told[-1]:
                return found | {"skipped": told[-1]}
            killed = f"killed by signal {-done.returncode}" if done.returncode < 0 else "no reason given"
            return found | {"failed": told[-1] if told else killed}
        found |= json.loads(done.stdout.strip().splitlines()[-1])
    return found


def markdown(results: dict[str, Any]) -> str:
    """Both tables: the process by cell, the categories beside the prediction."""
    lines = [
        "| model | recipe | rows x length | measured peak, MB | predicted, MB | error |",
        "|---|---|---|---|---|---|",
    ]
    more = [f"| model | recipe | rows x length | {' | '.join(CATEGORIES)} | all | predicted | error |"]
    more.append("|---" * (len(CATEGORIES) + 6) + "|")
    for cell in results["cells"].values():
        name = f"| {cell['model']} | {cell['name']} | {cell['rows']} x {cell['length']} |"
        if "live" not in cell:
            lines.append(f"{name} | | refused: {cell['skipped']} |" if "skipped" in cell else f"{name} | | failed |")
            continue
        memory, live = cell["memory"], cell["live"]
        peak, told = memory["measured_bytes"], memory["predicted_bytes"]
        if not told:
            lines.append(f"{name} {peak / 1e6:,.0f} | none: {memory.get('reason')} | |")
            continue
        lines.append(f"{name} {peak / 1e6:,.0f} | {told / 1e6:,.0f} | {told / peak - 1:+.1%} |")
        whole, foretold = sum(live.values()), sum(memory["predicted"][one] for one in CATEGORIES)
        values = " | ".join(f"{live[one] / 1e6:,.1f}" for one in CATEGORIES)
        more.append(f"{name} {values} | {whole / 1e6:,.1f} | {foretold / 1e6:,.1f} | {foretold / whole - 1:+.1%} |")
    head = (
        f"# Memory, measured and predicted\n\n{results['machine']}; fp32, one thread; `benchmarks/memory/table.py`.\n"
        + ("Predictions were made anew after the peaks were measured.\n" if results.get("predicted_anew") else "")
    )
    return "\n".join([head, "## The process", "", *lines, "", "## Living tensors by category, MB", "", *more, ""])


def write(path: Path, text: str) -> None:
    """A file as a whole: a reader, or one who stops this, finds the old text or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--models", default=",".join(MODELS))
    reader.add_argument("--methods", default=None, help="names of rows, separated by semicolons")
    reader.add_argument("--points", default=None, help="like 8x64,4x256")
    reader.add_argument("--no-lengths", action="store_true")
    reader.add_argument("--steps", type=int, default=3)
    reader.add_argument("--again", action="store_true", help="try cells once more that were refused")
    reader.add_argument("--predict", action="store_true", help="predict anew what is on file, measure nothing")
    reader.add_argument("--out", type=Path, default=RESULTS / "memory.json")
    reader.add_argument("--cell", help=argparse.SUPPRESS)
    reader.add_argument("--kind", help=argparse.SUPPRESS)
    asked = reader.parse_args()
    if asked.cell:
        from trimtab.engine.remembered import few_shapes_remembered

        few_shapes_remembered()  # as the command line does, before torch is loaded
        measure = as_process if asked.kind == "process" else by_category
        print(json.dumps(measure(json.loads(asked.cell), asked.steps)))
        return
    methods = list(METHODS) if asked.methods is None else [one.strip() for one in asked.methods.split(";")]
    points = list(POINTS)
    if asked.points:
        points = [(int(rows), int(length)) for rows, length in (one.split("x") for one in asked.points.split(","))]
    results: dict[str, Any] = {"machine": f"{platform.platform()}, {os.cpu_count()} cores", "cells": {}}
    if asked.out.is_file():
        results = json.loads(asked.out.read_text(encoding="utf-8"))
    for cell in cells(asked.models.split(","), methods, points, not asked.no_lengths):
        known = results["cells"].get(key_of(cell))
        if asked.predict and known is not None and "memory" in known:
            known["memory"] |= foretold(cell, asked.steps)
            results["predicted_anew"] = True
        elif asked.predict or is_done(known, asked.again):
            continue
        print(key_of(cell), flush=True)
        if not asked.predict:
            results["cells"][key_of(cell)] = measured(cell, asked.steps)
        write(asked.out, json.dumps(results, indent=1) + "\n")
        write(asked.out.with_suffix(".md"), markdown(results))


if __name__ == "__main__":
    main()
