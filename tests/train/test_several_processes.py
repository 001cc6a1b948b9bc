"""Several processes compute what one does; two gloo processes are started once for all the runs of this file."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.conftest import WORDS, save_model, write_rows
from tests.train.processes import Asked, adapter, apart, copied, settings_of, together

from trimtab import laws
from trimtab.core.errors import UserError
from trimtab.data.encoded import Encoded
from trimtab.data.shares import shares
from trimtab.train.recipe import recipe_from
from trimtab.train.run import resume, tune

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")

STEP: dict[str, Any] = {
    "optimizer": "sgd",
    "learning_rate": 1.0,
    "schedule": "constant",
    "warmup": 0,
    "clip": 0,
    "steps": 1,
}
"""One step of plain gradient descent at rate 1: what the adapter moves by is its gradient."""
LONG: dict[str, Any] = {"steps": 20, "learning_rate": 1e-3, "evaluate_every": 10}
RUNS: dict[str, dict[str, Any]] = {
    "step": STEP,
    "step-nf4": {**STEP, "quantize": "nf4"},
    "long": LONG,
    "one-row": {**LONG, "steps": 3, "batch_size": 1},
    "pissa": {**STEP, "method": "pissa"},
}
MORE: dict[str, dict[str, Any]] = {
    "step-padded": {**STEP, "packing": "off", "batch_size": 2, "accumulation": 3},
    "long-nf4": {**LONG, "quantize": "nf4-double", "batch_size": 3, "accumulation": 2},
    "adalora": {**LONG, "method": "adalora"},
    "galore": {**LONG, "optimizer": "galore", "optimizer_rank": 2, "steps": 5},
    "apollo": {**LONG, "optimizer": "apollo", "optimizer_rank": 2, "steps": 5},
    "paged": {**LONG, "optimizer": "paged", "steps": 5},
    "lisa": {**LONG, "active": "lisa", "active_layers": 1, "active_every": 3, "steps": 8, "optimizer": "adam8"},
    "badam": {**LONG, "active": "badam", "active_every": 3, "steps": 8},
    "diff-pruning": {**LONG, "method": "diff_pruning", "where": "q", "steps": 8},
}
"""What takes longer: methods, optimizers and schedules with state."""
CODES: dict[str, Any] = {**LONG, "method": "full_int8", "steps": 5}
"""Weights that each process rounds at random by itself."""
WAYS: dict[str, dict[str, Any]] = {"whole": {}, "spread": {"shard": "full", "checkpointing": "block"}}
BOUNDS = {"step": 1e-6, "pissa": 1e-6}
"""How far the adapter may be from one process's, after one step and after many."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def base(folder: Path) -> dict[str, Any]:
    rows = [
        {"prompt": f"say {one} {two}", "completion": " ".join([two, one] * (1 + len(two) % 4))}
        for one in WORDS[:6]
        for two in WORDS[6:12]
    ]
    model = save_model(folder / "model", chat=True)
    data = write_rows(folder / "rows.jsonl", rows)
    values = {"model": str(model), "data": str(data), "method": "lora", "rank": 4, "batch_size": 8, "heldout": "5"}
    return values | {"device": "cpu", "dtype": "float32", "save_every": 0}


def run_alone(base: dict[str, Any], runs: dict[str, dict[str, Any]], folder: Path) -> Path:
    for name, values in runs.items():
        tune(replace(recipe_from(taken(base, values)), output=str(folder / name)))
    return folder


@pytest.fixture(scope="module")
def alone(base: dict[str, Any], folder: Path) -> Path:
    """Every run in one process, in `folder/alone`."""
    return run_alone(base, RUNS, folder / "alone")


def taken(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**base, **values}.items() if key != "rank" or values.get("method") is None}


@pytest.fixture(scope="module")
def told(base: dict[str, Any], folder: Path) -> dict[str, list[str]]:
    """What both processes ended with, of all runs and faults; run directories in `folder`."""
    jobs = both_ways(base, RUNS)
    stopped = {**base, **LONG, "save_every": 5}
    jobs["stopped"] = Asked(stopped, fault="signal:7")
    jobs["disk"] = Asked({**base, **LONG, "save_every": 5}, fault="disk:10")
    jobs["lomo"] = Asked(taken(base, {"method": "full", "optimizer": "lomo"}))
    jobs["lora_drop"] = Asked(taken(base, {"method": "lora_drop"}))
    jobs["full"] = Asked(taken(base, {"method": "full", "shard": "full"}))
    jobs["codes"] = Asked(taken(base, CODES))
    jobs["hybrid"] = Asked({**base, **LONG, "shard": "hybrid"}, machines=2)
    jobs["missing"] = Asked({**base, "model": "no-such-model"})
    found = together(jobs, folder)
    copied(folder / "stopped", folder / "stopped-alone")
    return found


def both_ways(base: dict[str, Any], runs: dict[str, dict[str, Any]]) -> dict[str, Asked]:
    return {
        f"{name}-{way}": Asked(taken(base, {**values, **more}))
        for name, values in runs.items()
        for way, more in WAYS.items()
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_what_one_does(
    name: str, way: str, told: dict[str, list[str]], alone: Path, folder: Path
) -> None:
    assert told[f"{name}-{way}"] == ["done", "done"]
    assert apart(folder / f"{name}-{way}", alone / name) <= BOUNDS.get(name.partition("-")[0], 1e-5)
    ours, theirs = (json.loads((one / "run.json").read_text()) for one in (folder / f"{name}-{way}", alone / name))
    for when in ("before", "after"):
        assert ours[when]["loss"] == pytest.approx(theirs[when]["loss"], rel=1e-6)
        assert ours[when]["tokens"] == theirs[when]["tokens"]
    assert ours["kept_step"] == theirs["kept_step"]
    assert ours["processes"] == 2
    assert "processes" not in theirs


def test_processes_that_round_at_random_round_alike(told: dict[str, list[str]], base: Any, folder: Path) -> None:
    assert told["codes"] == ["done", "done"]
    run_alone(base, {"codes": CODES}, folder / "by-itself")
    ours, theirs = (json.loads((folder / one / "run.json").read_text()) for one in ("codes", "by-itself/codes"))
    assert ours["after"]["loss"] == pytest.approx(theirs["after"]["loss"], rel=1e-4)
    assert ours["after"]["loss"] < 0.995 * ours["before"]["loss"]
    one, other = (adapter(folder / where) for where in ("codes", "by-itself/codes"))
    codes = [key for key in one if key.endswith("codes")]
    apart = [(one[key].int() - other[key].int()).abs() for key in codes]
    assert max(int(steps.max()) for steps in apart) <= 1  # a sum in another order may fall on the other side of a draw
    assert sum(int(steps.sum()) for steps in apart) < 0.001 * sum(steps.numel() for steps in apart)


def test_a_step_moved_something(told: dict[str, list[str]], folder: Path) -> None:
    moved = [value for key, value in adapter(folder / "step-whole").items() if key.endswith("B")]
    assert max(float(value.abs().max()) for value in moved) > 1e-3


def test_machines_of_one_process_each_keep_whole_copies(told: dict[str, list[str]], alone: Path, folder: Path) -> None:
    assert told["hybrid"] == ["done", "done"]
    assert apart(folder / "hybrid", alone / "long") <= 1e-5


def test_a_signal_to_one_process_stops_all_and_any_number_goes_on(
    told: dict[str, list[str]], alone: Path, folder: Path
) -> None:
    assert [one.partition(";")[0] for one in told["stopped"]] == ["Stopped: stopped after step 7 of 20"] * 2
    resume(folder / "stopped-alone")
    assert apart(folder / "stopped-alone", alone / "long") <= 1e-5


def test_a_full_disk_is_told_once_and_leaves_the_last_checkpoint(told: dict[str, list[str]], folder: Path) -> None:
    assert told["disk"] == ["UserError: save: could not write: No space left on device", "Elsewhere: "]
    assert [path.name for path in (folder / "disk" / "checkpoints").iterdir()] == ["step-00000005"]
    assert not (folder / "disk" / "adapter").exists()


@pytest.mark.parametrize(
    "name, reason",
    [
        ("lomo", "used and dropped before those of the other processes"),
        ("lora_drop", "the processes would decide differently"),
        ("full", "hardly anything would be spread"),
        ("missing", "no-such-model"),
    ],
)
def test_what_cannot_run_is_refused_at_the_start_once(
    name: str, reason: str, told: dict[str, list[str]], folder: Path
) -> None:
    first, second = told[name]
    assert reason in first
    assert second == "Elsewhere: "
    assert not (folder / name).exists()


def test_rows_are_shared_out_by_tokens() -> None:
    lengths = [90, 10, 50, 40, 10, 20]
    rows = [Encoded(list(range(at, at + length)), [True] * length) for at, length in enumerate(lengths)]
    found = shares(rows, 2)
    assert sorted(index for part in found for index in part) == list(range(6))
    assert [sum(len(rows[index].ids) for index in part) for part in found] == [110, 110]
    assert shares(rows[:1], 3) == [[0], [], []]


def test_rows_with_one_beginning_stay_together() -> None:
    starts = [list(range(100 * at, 100 * at + 60)) for at in range(2)]
    rows = [Encoded([*starts[at % 2], 1000 + at, 1001 + at], [True] * 62) for at in range(8)]
    assert shares(rows, 2, common=True) == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_one_process_touches_nothing_of_it(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "trimtab.engine.shards", raising=False)
    for name in ("init_process_group", "init_device_mesh", "all_reduce", "broadcast", "barrier"):
        monkeypatch.delattr(torch.distributed, name)
    tune(replace(recipe_from({**base, "steps": 2, "save_every": 1}), output=str(tmp_path / "run")))
    assert "trimtab.engine.shards" not in sys.modules


@pytest.mark.slow
def test_methods_and_updates_with_state_train_as_alone(base: dict[str, Any], tmp_path: Path) -> None:
    run_alone(base, MORE, tmp_path / "alone")
    told = together(both_ways(base, MORE), tmp_path)
    assert told == {name: ["done", "done"] for name in told}
    for name in MORE:
        bound = 1e-6 if name.startswith("step") else 1e-5
        far = {way: apart(tmp_path / f"{name}-{way}", tmp_path / "alone" / name) for way in WAYS}
        assert max(far.values()) <= bound, (name, far)


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_every_method_has_the_gradients_of_one_process(
    quantize: str | None, base: dict[str, Any], tmp_path: Path
) -> None:
    runs, alone = {}, tmp_path / "alone"
    for name, method in laws.registered().items():
        values = {**STEP, "method": name, "settings": settings_of(method), "quantize": quantize, "batch_size": 4}
        try:
            run_alone(base, {name: values}, alone)
        except UserError:
            continue  # not for this model, or not on codes
        runs[name] = values
    told = together(both_ways(base, runs), tmp_path)
    assert len(runs) > 40
    refused = {name for name, words in told.items() if words != ["done", "done"]}
    assert all("recipe: several processes" in told[name][0] or "recipe: shard" in told[name][0] for name in refused)
    assert {name for name in refused if name.endswith("whole")} == {"auto_prompt-whole", "lora_drop-whole"}
    far = {name: apart(tmp_path / name, alone / name.rpartition("-")[0]) for name in told if name not in refused}
    assert {name: one for name, one in far.items() if not one <= 1e-6} == {}
