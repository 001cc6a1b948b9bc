"""A batch whose rows use 16 different adapters against the same batch with one: forward passes and generation steps.

    python benchmarks/mixed_batch.py [--rows 16] [--rank 8] [--tokens 64] [--rounds 15]

SmolLM2-135M-Instruct with `--rows` LoRA adapters on all linears, drawn at random with B ≠ 0. One process runs three
ways in turns, so that a busy machine slows all of them alike: every row with the same adapter, every row with its own
in grouped products, and every row with its own in a loop over the adapters. Timed are the forward of rows of `--tokens`
tokens and one generation step (one new token a row behind `--tokens` cached ones); each figure is the median of
`--rounds`. Writes `benchmarks/results/mixed_batch.json`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import trimtab as tt
from trimtab.core import deltas
from trimtab.evaluate import timing
from trimtab.models.loading import load

RESULTS = Path(__file__).parent / "results"


def prepared(rows: int, rank: int) -> Any:
    """The model with an adapter for every row."""
    model = load("smollm2-135m-instruct", dtype="float32", device="cpu").model.eval()
    generator = torch.Generator().manual_seed(0)
    for number in range(rows):
        tt.attach(model, tt.LoRA(rank=rank), "all-linear", name=f"a{number}", seed=number)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model.requires_grad_(False)


def ways(model: Any, rows: int) -> dict[str, Callable[[], None]]:
    """How the rows choose their adapters: what to do before a measurement."""
    real, own = deltas.grouped, [f"a{number}" for number in range(rows)]

    def use(names: Any, grouped: Any) -> None:
        deltas.grouped = grouped
        tt.activate(model, names)

    return {
        "one": lambda: use("a0", real),
        "grouped": lambda: use(own, real),
        "loop": lambda: use(own, lambda key, state, used, x, y, *rest: (y, set())),
    }


def jobs(model: Any, rows: int, tokens: int) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Job -> its preparation, which returns what is timed."""
    ids = timing.tokens(model, rows, tokens)
    return {"forward": lambda: timing.forward_of(model, ids), "step": lambda: timing.step_of(model, ids)}


def measure(model: Any, asked: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of every job each way, taken in turns, and how far the ways' outputs are apart."""
    found: dict[str, Any] = {}
    choices = ways(model, asked.rows)
    for name, prepare in jobs(model, asked.rows, asked.tokens).items():
        times: dict[str, list[float]] = {way: [] for way in choices}
        outputs = {}
        for _ in range(asked.rounds):
            for way, use in choices.items():
                use()
                run = prepare()
                outputs[way] = run()  # also warms up: factors are stacked here
                for _ in range(1 if name == "forward" else 5):
                    start = time.perf_counter()
                    run()
                    times[way].append(time.perf_counter() - start)
        median = {way: statistics.median(one) for way, one in times.items()}
        found[name] = {
            "seconds": median,
            "throughput_beside_one_adapter": {way: median["one"] / median[way] for way in ("grouped", "loop")},
            "largest_difference_to_the_loop": float((outputs["grouped"] - outputs["loop"]).abs().max()),
            "largest_logit": float(outputs["loop"].abs().max()),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args()
    with torch.no_grad():
        measured = measure(prepared(asked.rows, asked.rank), asked)
    document = {
        "model": "smollm2-135m-instruct",
        **vars(asked),
        "where": "all-linear",
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "trimtab": tt.__version__},
        "results": measured,
    }
    text = json.dumps(document, indent=1)
    (RESULTS / "mixed_batch.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
