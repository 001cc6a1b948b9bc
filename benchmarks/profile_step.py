"""Where the time of a training step goes, and how near it comes to the machine's own matrix-product rate.

    python benchmarks/profile_step.py --data DIR [--task e2e|sst2] [--steps 6] [RECIPE SETTING=VALUE ...]

DIR holds `e2e/trainset.csv.gz` and `glue/SST-2/train.tsv`. Settings after the flags go into the recipe (`packing=off`,
`method=ia3`, `quantize=nf4`). Steps run once to warm up, once on the clock and once under torch's profiler; shares are
of the profiled operators' own time, Python is what the clock shows beyond them. Writes
`benchmarks/results/profile-<task>.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from trimtab.train.prepare import prepare
from trimtab.train.recipe import recipe_from
from trimtab.train.reporter import Reporter
from trimtab.train.run import train

RESULTS = Path(__file__).parent / "results"
MATRIX = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "_linear_pointwise", "mkldnn_linear")
ATTENTION = ("scaled_dot_product", "flash_attention", "segment_attention")

RECIPES: dict[str, dict[str, Any]] = {
    "e2e": {
        "model": "smollm2-135m-instruct",
        "data": "e2e/trainset.csv.gz",
        "columns": {"prompt": "mr", "completion": "ref"},
        "method": "lora",
        "rank": 8,
        "where": "all-linear",
        "limit": 400,
        "heldout": "10",
        "learning_rate": 2e-4,
        "dtype": "float32",
    },
    "sst2": {
        "model": "minilm-l6",
        "data": "glue/SST-2/train.tsv",
        "method": "lora",
        "where": "q, v",
        "limit": 2000,
        "heldout": "10",
        "batch_size": 32,
        "learning_rate": 2e-3,
        "dtype": "float32",
    },
}


def peak() -> float:
    """Multiplications and additions per second of large fp32 matrix products: the best of several sizes."""
    best = 0.0
    for size in (768, 1024, 1536, 2048):
        a, b = torch.randn(size, size), torch.randn(size, size)
        a @ b
        for _ in range(5):
            started = time.perf_counter()
            a @ b
            best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def kind(name: str) -> str:
    """Which share an operator belongs to."""
    plain = name.rpartition("::")[2].removesuffix("_")  # addmm_ is addmm in place; mkldnn:: is oneDNN's
    if any(word in plain for word in ATTENTION):
        return "attention"
    return "matrix products" if plain in MATRIX else "element-wise and indexing"


def multiplications(name: str, shapes: list[Any]) -> int:
    """Multiplications and additions of one matrix product from the shapes it was given, 0 of any other operator.

    The profiler counts neither oneDNN's products nor those in place.
    """
    if kind(name) != "matrix products":
        return 0
    matrices = [shape for shape in shapes if len(shape) >= 2]
    left, right = matrices[-2:]  # addmm's and baddbmm's first matrix is what they add to
    plain = name.rpartition("::")[2]
    out = right[-2] if "linear" in plain else right[-1]
    return 2 * math.prod(left) * out


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--data", type=Path, required=True)
    reader.add_argument("--task", choices=list(RECIPES), default="e2e")
    reader.add_argument("--steps", type=int, default=6)
    reader.add_argument("--top", type=int, default=0, help="also print this many operators")
    reader.add_argument("settings", nargs="*")
    asked = reader.parse_args()
    values = dict(RECIPES[asked.task])
    values["data"] = str(asked.data / values["data"])
    values |= dict(item.split("=", 1) for item in asked.settings)
    with tempfile.TemporaryDirectory() as folder:
        values["output"] = f"{folder}/run"
        job = prepare(recipe_from({**values, "steps": asked.steps}), Reporter())
        job.directory.mkdir(parents=True, exist_ok=True)
        job = replace(job, steps=asked.steps)
        with job.running():
            train(replace(job, steps=2), Reporter())
            started = time.perf_counter()
            lines = train(job, Reporter())
            seconds = time.perf_counter() - started
            with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
                train(job, Reporter())
    events = recorded.key_averages(group_by_input_shape=True)  # attention inside its kernel is not counted
    count = sum(event.count * multiplications(event.key, event.input_shapes) for event in events)
    shares: dict[str, float] = {}
    for event in events:
        shares[kind(event.key)] = shares.get(kind(event.key), 0.0) + event.self_cpu_time_total / 1e6
    operators = sum(shares.values())
    rate = peak()
    matrix = shares.get("matrix products", 0.0)
    result = {
        "task": asked.task,
        "settings": asked.settings,
        "packing": job.packing,
        "steps": asked.steps,
        "seconds_per_step": seconds / asked.steps,
        "rows_per_second": lines[-1]["rows"] / seconds,
        "share_of_operator_time": {name: value / operators for name, value in sorted(shares.items())},
        "operator_seconds_profiled": operators,
        "python_share": max(0.0, 1 - operators / max(seconds, operators)),
        "flops_per_step": count / asked.steps,
        "machine_peak_flops": rate,
        "step_rate_over_peak": count / seconds / rate,
        "matrix_rate_over_peak": count / matrix / rate,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {platform.system()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if asked.top:
        table = recorded.key_averages().table(
            sort_by="self_cpu_time_total", row_limit=asked.top, max_name_column_width=44
        )
        print(table)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"profile-{asked.task}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    json.dump(result, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
