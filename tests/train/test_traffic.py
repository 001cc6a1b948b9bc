"""What real processes send each other is what planning says: counted in 2 and in 4 gloo processes."""

from __future__ import annotations

import json
import math
import os
import socket
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.conftest import WORDS, save_model, write_rows
from tests.train.traffic import Traffic

from trimtab.plan.dry_run import prepared
from trimtab.plan.planning import new_modules_of, read_outline, task_of
from trimtab.plan.traffic import parts_of, traffic
from trimtab.train.recipe import recipe_from

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")

RUNS: dict[str, dict[str, Any]] = {
    "copies": {},
    "spread": {"shard": "full"},
    "spread-again": {"shard": "full", "checkpointing": "block"},
    "spread-passes": {"shard": "full", "batch_size": 2, "accumulation": 4},
    "spread-nf4": {"shard": "full", "quantize": "nf4"},
    "spread-hybrid": {"shard": "hybrid", "method": "ia3"},
}
STEPS = (1, 2)


def counted(rank: int, size: int, port: int, runs: dict[str, dict[str, Any]], folder: Path) -> None:
    """Runs of one step and of two; what the second one adds is the traffic of a step."""
    from trimtab.train import run

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1", "TRIMTAB_HOME": str(folder / "home")}
    torch.distributed.init_process_group("gloo")
    passes = 0
    plain = run.Job.passes

    def counting(job: Any, rows: Any) -> Any:
        nonlocal passes
        micro = plain(job, rows)
        passes += len(micro)
        return micro

    run.Job.passes = counting  # type: ignore[method-assign]
    for name, values in runs.items():
        os.environ["LOCAL_WORLD_SIZE"] = str(size // 2 if values.get("shard") == "hybrid" else size)
        found = []
        for steps in STEPS:
            recipe = replace(recipe_from({**values, "steps": steps}), output=str(folder / f"{name}-{size}-{steps}"))
            passes = 0
            with Traffic() as seen:
                run.tune(recipe)
            found.append((seen, passes))
        (one, before), (two, after) = found
        calls = {key: two.calls[key] - one.calls[key] for key in two.calls}
        sizes = {key: two.bytes[key] - one.bytes[key] for key in two.calls}
        told = {"calls": calls, "bytes": sizes, "passes": after - before}
        (folder / f"{name}-{size}.{rank}.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traffic")


@pytest.fixture(scope="module")
def recipes(folder: Path) -> dict[str, dict[str, Any]]:
    rows = [{"prompt": f"say {one}", "completion": f"{two} {one}"} for one in WORDS[:6] for two in WORDS[6:12]]
    model, data = save_model(folder / "model", chat=True), write_rows(folder / "rows.jsonl", rows)
    base = {"model": str(model), "data": str(data), "method": "lora", "batch_size": 8, "heldout": "5"}
    base |= {"device": "cpu", "dtype": "float32", "save_every": 0}
    return {name: {**base, **values} for name, values in RUNS.items()}


@pytest.mark.parametrize(("size", "names"), [(2, list(RUNS)), (4, ["copies", "spread-nf4", "spread-hybrid"])])
def test_a_step_sends_what_the_formulas_say(
    size: int, names: list[str], recipes: dict[str, dict[str, Any]], folder: Path
) -> None:
    recipes = {name: recipes[name] for name in names}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(counted, (size, port, recipes, folder), nprocs=size)
    for name, values in recipes.items():
        recipe = recipe_from(values)
        model = read_outline(recipe)
        task = task_of(model, recipe)
        parts = parts_of(prepared(recipe, model, task, new_modules_of(model, task), 64).model)
        shards = {"none": 1, "full": size, "hybrid": size // 2}[recipe.shard]
        least = math.ceil(recipe.accumulation / size)  # shares go by tokens, so one process may have a row more
        for rank in range(size):
            seen = json.loads((folder / f"{name}-{size}.{rank}.json").read_text())
            assert least <= seen["passes"] <= least + 1
            expected = asdict(traffic(parts, shards, size, seen["passes"]))
            calls, sizes = seen["calls"], seen["bytes"]
            told = {"gathers": calls.get("all_gather", 0), "gathered": sizes.get("all_gather", 0)}
            told |= {"reductions": calls["all_reduce"], "reduced": sizes["all_reduce"], "control": calls["control"]}
            assert told == expected, (name, rank)
            assert not any(calls[key] for key in calls if key not in ("all_gather", "all_reduce", "control")), calls
