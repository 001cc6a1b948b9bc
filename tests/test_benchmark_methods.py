"""The bookkeeping of the table of methods: no run is repeated, test rows choose nothing, one seed is no comparison."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).resolve().parent.parent / "benchmarks" / "methods.py"
RATES = [0.3, 1.0, 3.0]


@pytest.fixture(scope="module")
def bench_module() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_of_methods", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def bench(module: Any, folder: Path, calls: list[tuple[str, float, int]], stop_after: int = 99) -> Any:
    """Made-up runs: the loss on the selection rows is lowest at 0.3 times the rate, where LoRA's second seed fails."""

    class Made(module.Bench):
        def __init__(self) -> None:
            self.name, self.task, self.rows = "sst2", module.TASKS["sst2"], "rows"
            self.log = folder / "sst2.jsonl"

        def run(self, entry: Any, factor: float, seed: int, best: float) -> dict[str, Any]:
            if len(calls) >= stop_after:
                raise KeyboardInterrupt
            calls.append((entry.name, factor, seed))
            loss = 9.0 if (entry.name, factor, seed) == ("lora", 0.3, 1) else 0.5 + abs(factor - 0.3) / 10
            found = {"key": self.key(entry, factor, seed), "factor": factor, "seed": seed, "total_seconds": 0.0}
            found |= {"choose": {"loss": loss}, "where": "q", "rate": factor, "trainable": 1, "total": 2}
            if loss < best:
                found["test"] = {"accuracy": 0.9 if entry.name == "lora" else 0.5 + seed / 10}
            return found | {"peak_bytes": 1, "seconds": 1.0}

    return Made()


def test_a_stopped_benchmark_goes_on_behind_its_last_run(bench_module: Any, tmp_path: Path) -> None:
    listed = bench_module.compared(bench_module.TASKS["sst2"], ["untuned", "head only", "lora"])
    assert [one.name for one in listed] == ["untuned", "head only", "lora"]
    calls: list[tuple[str, float, int]] = []
    with pytest.raises(KeyboardInterrupt):
        bench_module.carry_out(bench(bench_module, tmp_path, calls, 4), listed, RATES, time.monotonic() + 60)
    with open(tmp_path / "sst2.jsonl", "a") as log:
        log.write('{"key": "cut sho')
    with open(tmp_path / "sst2.jsonl", "a") as log:
        log.write("\n")
    assert bench_module.carry_out(bench(bench_module, tmp_path, calls), listed, RATES, time.monotonic() + 60)
    first = [(1, 0), (0.3, 0), (3, 0), (0.1, 0), (0.3, 1), (0.1, 1)]  # 0.1 since 0.3 was the outermost and the best
    assert [call[1:] for call in calls if call[0] == "head only"] == first
    assert [call[1:] for call in calls if call[0] == "lora"] == [*first, (0.1, 0)]  # again, now with its test rows
    assert len(calls) == 2 + 6 + 7
    before = len(calls)
    assert bench_module.carry_out(bench(bench_module, tmp_path, calls), listed, RATES, time.monotonic() + 60)
    assert len(calls) == before
    assert not bench_module.carry_out(bench(bench_module, tmp_path, calls), listed, [2.0], time.monotonic() - 1)

    rows = {row["name"]: row for row in bench_module.table(bench(bench_module, tmp_path, calls), listed, RATES)}
    assert rows["lora"]["factor"] == 0.1
    assert rows["head only"]["factor"] == 0.3
    assert rows["lora"]["beats_head"] is True
    assert rows["head only"]["scores"] == [0.5, 0.6]
    made = bench(bench_module, tmp_path, calls)
    conditions = {"test_rows": 872, "rates": RATES, "machine": "m", "threads": 1, "versions": {"torch": "2"}}
    assert "| lora | 0.9000 |" in bench_module.markdown(made, list(rows.values()), conditions)


def test_a_method_is_clearly_better_when_its_worse_seed_is(bench_module: Any) -> None:
    assert bench_module.beats([0.8, 0.7], [0.6, 0.69], higher=True)
    assert not bench_module.beats([0.8, 0.6], [0.5, 0.69], higher=True)
    assert bench_module.beats([1.0, 1.1], [1.2, 1.3], higher=False)


def test_everything_that_trains_is_compared_and_equal_presets_once(bench_module: Any) -> None:
    import trimtab as tt

    names = [one.name for one in bench_module.compared(bench_module.TASKS["e2e"], ["*"])]
    assert set(names) >= set(tt.methods())
    assert "dora" not in names  # it is `magnitude` with its own defaults
    assert "loftq" in names


@pytest.mark.parametrize("whole", [0.4, 0.6])
def test_short_runs_choose_a_rate_that_has_to_hold_over_all_rows(bench_module: Any, whole: float) -> None:
    """Short runs are best at once the rate, with 0.5; where all rows do not get below that, a lower one is tried."""
    (entry,) = bench_module.compared(bench_module.TASKS["e2e"], ["lora"])
    short = {0.3: 0.55, 1.0: 0.5, 3.0: 0.52}
    runs: dict[tuple[float, int], Any] = {}
    for factor, seed in bench_module.plan(entry, RATES, runs, True):
        loss = short[factor] if seed == bench_module.SHORT else whole if factor == 1.0 else 0.45
        runs[factor, seed] = {"choose": {"loss": loss}}
    tried = [at for at in runs if at[1] != bench_module.SHORT]
    kept = 1.0 if whole < 0.5 else 0.3
    assert tried == [(1.0, 0), *([(0.3, 0)] if kept == 0.3 else []), (kept, 1)]
    assert bench_module.chosen(runs) == kept
