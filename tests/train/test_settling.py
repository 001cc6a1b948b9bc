"""Methods that decide something over all their sites during a run: new masks, the end of gates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import WORDS, save_model, write_rows
from tests.train.test_resume import adapter, stopped_at

from trimtab.core.registry import find
from trimtab.train.recipe import Recipe, recipe_from
from trimtab.train.run import resume, tune


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("settling")
    found = [{"prompt": f"say {one} {two}", "completion": f"{two} {one}"} for one in WORDS[:6] for two in WORDS[6:12]]
    rows = write_rows(folder / "rows.jsonl", found)
    values: dict[str, Any] = {"model": str(save_model(folder / "tiny", chat=True)), "data": str(rows)}
    values |= {"method": "lora", "batch_size": 6, "steps": 9, "heldout": "4", "save_every": 1, "device": "cpu"}
    return recipe_from(values)


SETTINGS: dict[str, dict[str, Any]] = {
    "fish_dip": {"every": 3, "density": 0.02},
    "diff_pruning": {"gates_until": 5, "density": 0.02},
    "structured_diff_pruning": {"gates_until": 50, "density": 0.02},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_ends_sparse_and_resumes_to_the_same_bytes(recipe: Recipe, name: str, tmp_path: Path) -> None:
    from safetensors.torch import load

    job = replace(recipe, method=name, settings=SETTINGS[name])
    result = tune(replace(job, output=str(tmp_path / "whole")))
    assert result.after["loss"] < result.before["loss"]
    stored = load(adapter(tmp_path / "whole"))
    values = [one for key, one in stored.items() if key.endswith(".value")]
    total = sum(one.numel() for one in values)
    assert all(one.ndim == 1 for one in values)
    assert 0 < total < 0.03 * result.total
    if name == "fish_dip":
        assert any(one.numel() for key, one in stored.items() if key.endswith(".kept_value"))
    assert find(name).elastic >= {"value", "index"}
    for step in (4, 7):
        directory = tmp_path / f"stopped-{step}"
        stopped_at(job, directory, step)
        resume(directory)
        assert adapter(directory) == adapter(tmp_path / "whole")


def test_adalora_gives_out_its_ranks_within_a_short_run(recipe: Recipe, tmp_path: Path) -> None:
    """Its own schedule begins at step 100; the run has 9 steps and ends with the mean rank it was asked for."""
    from safetensors.torch import load

    job = replace(recipe, method="adalora", settings={"rank": 4, "target": 2}, output=str(tmp_path / "run"))
    result = tune(job)
    stored = load(adapter(result.directory))
    own = [one for key, one in stored.items() if key.endswith("_proj.lambda_")]
    ranks = [int((one != 0).sum()) for one in own]
    assert len(ranks) == 14
    assert sum(ranks) == 2 * len(ranks)
    assert len(set(ranks)) > 1


def test_the_gates_of_a_short_run_are_gone_after_half_of_it(recipe: Recipe, tmp_path: Path) -> None:
    assert find("diff_pruning")(gates_until=5).over(9).gates_until == 5
    short = find("diff_pruning")().over(9)
    assert (short.gates_until, short.over(9)) == (4, short)
    job = replace(recipe, method="diff_pruning", settings={"density": 0.02})
    asked = replace(job, settings={"density": 0.02, "gates_until": 4}, output=str(tmp_path / "asked"))
    tune(replace(job, output=str(tmp_path / "default")))
    tune(asked)
    assert adapter(tmp_path / "default") == adapter(tmp_path / "asked")


@pytest.mark.parametrize("name", SETTINGS)
def test_classifiers_settle_too(name: str, tmp_path: Path) -> None:
    """Their logits have a graph of their own, which must be gone when tensors change their shape."""
    rows = [{"text": f"{one} cat", "label": "short" if len(one) < 5 else "long"} for one in WORDS]
    model = save_model(tmp_path / "bert", chat=False, architecture="bert")
    values: dict[str, Any] = {"model": str(model), "data": str(write_rows(tmp_path / "rows.jsonl", rows))}
    values |= {"method": name, "settings": SETTINGS[name], "batch_size": 4, "steps": 8, "heldout": "4"}
    result = tune(recipe_from(values | {"device": "cpu", "output": str(tmp_path / "run")}))
    assert result.after["loss"] < 2
