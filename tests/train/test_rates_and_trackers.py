"""The learning-rate range test, and trackers that get what the log gets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.conftest import WORDS, save_model, write_rows

from trimtab.core.errors import UserError
from trimtab.train import trackers
from trimtab.train.find_rate import find_rate, smoothed, steepest
from trimtab.train.recipe import Recipe, recipe_from
from trimtab.train.run import tune


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    model = save_model(tmp_path_factory.mktemp("models") / "tiny", chat=True)
    found = [{"prompt": f"say {one} {two}", "completion": f"{two} {one}"} for one in WORDS[:6] for two in WORDS[6:12]]
    data = write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", found)
    return recipe_from({"model": str(model), "data": str(data), "method": "lora", "steps": 4, "device": "cpu"})


def test_the_steepest_fall_before_the_lowest_point_is_suggested() -> None:
    rates = [10.0**at for at in range(-9, 1)]
    assert steepest(rates, [5, 5, 5, 4.9, 4.5, 3.0, 2.0, 1.9, 4.0, 9.0]) == pytest.approx(1e-4)
    assert steepest(rates, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]) is None
    assert smoothed([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])


def test_a_sweep_says_a_rate_and_leaves_a_plot(recipe: Recipe, tmp_path: Path) -> None:
    found = find_rate(replace(recipe, output=str(tmp_path / "sweep")), steps=20)
    assert found.plot.read_bytes().startswith(b"\x89PNG")
    assert found.rates[-1] / found.rates[0] == pytest.approx(1000)
    assert found.suggested is None or found.rates[0] <= found.suggested <= found.rates[-1]


def test_a_tracker_gets_every_step(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, dict[str, float]]] = []
    closed: list[bool] = []

    class Remember(trackers.Tracker):
        package = "json"

        def __init__(self, directory: Path, settings: Any) -> None:
            assert settings["method"][0]["method"]["methods"] == "lora"

        def log(self, numbers: Any, step: int) -> None:
            seen.append((step, dict(numbers)))

        def close(self) -> None:
            closed.append(True)

    monkeypatch.setitem(trackers.TRACKERS, "remember", Remember)
    directory = tmp_path / "run"
    tune(replace(recipe, output=str(directory), track="remember"))
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [(line.pop("step"), line) for line in lines] == seen
    assert closed == [True]


def test_an_unknown_or_missing_tracker_is_refused_before_anything_is_done(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no tracker tensorbord"):
        tune(replace(recipe, output=str(tmp_path / "one"), track="tensorbord"))
    monkeypatch.setattr(trackers, "installed", lambda package: False)
    with pytest.raises(UserError, match="wandb is not installed"):
        tune(replace(recipe, output=str(tmp_path / "two"), track="wandb"))
    assert not (tmp_path / "one").exists()


def test_tensorboard_writes_event_files(recipe: Recipe, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    tune(replace(recipe, output=str(tmp_path / "board"), track="tensorboard"))
    assert list((tmp_path / "board" / "tensorboard").glob("events*"))
    assert torch.is_grad_enabled()
