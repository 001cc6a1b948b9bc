"""Training on several data sets at once: shares, what is held out, resuming, and sets that do not go together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import WORDS, write_rows
from tests.train.test_resume import At, adapter

from trimtab.core.errors import UserError
from trimtab.data.mixture import Mixed
from trimtab.train.interrupt import Stopped
from trimtab.train.prepare import prepare
from trimtab.train.recipe import Recipe, recipe_from
from trimtab.train.reporter import Reporter
from trimtab.train.run import resume, tune
from trimtab.train.verify import verify


@pytest.fixture(scope="module")
def mix(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 prompts, and 12 conversations that weigh as much."""
    folder = tmp_path_factory.mktemp("mix")
    chats = [
        {"messages": [{"role": "user", "content": f"turn {word}"}, {"role": "assistant", "content": word}]}
        for word in WORDS[:12]
    ]
    write_rows(folder / "chats.jsonl", chats)
    path = folder / "mix.yaml"
    path.write_text(f"- path: {rows}\n  weight: 1\n- path: chats.jsonl\n  weight: 1\n")
    return path


@pytest.fixture
def recipe(model: Path, mix: Path) -> Recipe:
    values: dict[str, Any] = {"model": str(model), "data": str(mix), "method": "lora", "rank": 2, "dropout": 0.1}
    values |= {"batch_size": 4, "steps": 25, "heldout": "0.25", "device": "cpu", "save_every": 1}
    return recipe_from(values)


def test_an_epoch_has_its_share_of_each(recipe: Recipe, mix: Path, rows: Path, tmp_path: Path) -> None:
    job = prepare(recipe, Reporter(), tmp_path / "run")
    assert isinstance(job.train_rows, Mixed)
    assert job.train_rows.names == (str(rows), "chats.jsonl")
    assert job.train_rows.sizes == (27, 9)
    assert job.train_rows.amounts == (18, 18)
    assert job.steps_per_epoch == 9
    assert isinstance(job.heldout_rows, Mixed)
    assert job.heldout_rows.sizes == job.heldout_rows.amounts == (9, 3)
    assert job.record["data"]["sources"][1] == "chats.jsonl: 18 of 36 rows an epoch (50%), it has 9"


def test_limits_and_numbers_are_parted_by_weight(recipe: Recipe, tmp_path: Path) -> None:
    job = prepare(replace(recipe, limit=10, heldout="6"), Reporter(), tmp_path / "run")
    assert isinstance(job.train_rows, Mixed)
    assert isinstance(job.heldout_rows, Mixed)
    assert job.train_rows.sizes == (5, 5)
    assert job.heldout_rows.sizes == (3, 3)


def test_the_loss_of_each_is_told(recipe: Recipe, rows: Path, tmp_path: Path) -> None:
    result = tune(replace(recipe, output=str(tmp_path / "run"), steps=9))
    named = [f"loss ({rows})", "loss (chats.jsonl)"]
    for found in (result.before, result.after):
        assert min(found[name] for name in named) < found["loss"] < max(found[name] for name in named)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["data"]["form"] == "prompt-completion, messages"


def test_a_stopped_run_ends_with_the_same_bytes(recipe: Recipe, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    tune(replace(recipe, output=str(whole)))

    def stop() -> None:
        raise Stopped("here")

    with pytest.raises(Stopped):
        tune(replace(recipe, output=str(stopped)), At(13, stop))
    resume(stopped)
    assert adapter(stopped) == adapter(whole)


def test_a_mixture_that_changed_is_not_gone_on_with(recipe: Recipe, mix: Path, tmp_path: Path) -> None:
    other = mix.parent / "other.yaml"
    other.write_text(mix.read_text())

    def stop() -> None:
        raise Stopped("here")

    with pytest.raises(Stopped):
        tune(replace(recipe, data=str(other), output=str(tmp_path / "run")), At(3, stop))
    other.write_text(mix.read_text().replace("weight: 1", "weight: 2", 1))
    with pytest.raises(UserError, match="data differ"):
        resume(tmp_path / "run")


def test_verify_runs_on_a_mixture(recipe: Recipe) -> None:
    assert all(check.passed for check in verify(recipe))


def test_sets_of_different_tasks_are_refused(recipe: Recipe, rows: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "labels.jsonl", [{"text": word, "label": word[0]} for word in WORDS[:6]])
    (tmp_path / "mix.yaml").write_text(f"- {rows}\n- labels.jsonl\n")
    with pytest.raises(UserError, match=r"one model has one task, but .*causal; labels\.jsonl makes classify"):
        prepare(replace(recipe, data=str(tmp_path / "mix.yaml")), Reporter(), tmp_path / "run")


def test_an_error_in_a_row_names_its_file(recipe: Recipe, rows: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "long.jsonl", [{"prompt": "say " * 400, "completion": word} for word in WORDS[:6]])
    (tmp_path / "mix.yaml").write_text(f"- {rows}\n- long.jsonl\n")
    with pytest.raises(UserError, match=r"long\.jsonl: "):
        prepare(replace(recipe, data=str(tmp_path / "mix.yaml"), max_length=50), Reporter(), tmp_path / "run")
