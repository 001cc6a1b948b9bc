"""A run that is stopped, killed or damaged and goes on ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.core.errors import UserError
from trimtab.train import checkpoint
from trimtab.train.interrupt import Stopped
from trimtab.train.recipe import Recipe, recipe_from
from trimtab.train.reporter import Reporter
from trimtab.train.run import resume, tune

KILLS = 20


@pytest.fixture(scope="module")
def recipe(model: Path, rows: Path) -> Recipe:
    """Two micro-batches a step, dropout, several epochs: everything a careless resume gets wrong."""
    values: dict[str, Any] = {"model": str(model), "data": str(rows), "method": "lora", "rank": 2, "dropout": 0.2}
    values |= {"batch_size": 3, "accumulation": 2, "steps": 50, "heldout": "4", "save_every": 1, "device": "cpu"}
    return recipe_from(values)


def adapter(directory: Path) -> bytes:
    return (directory / "adapter" / "adapter.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "whole"
    tune(replace(recipe, output=str(directory)))
    return directory


class At(Reporter):
    """Does something once, after a step."""

    def __init__(self, step: int, act: Any) -> None:
        self.at, self.act = step, act

    def step(self, metrics: Mapping[str, Any]) -> None:
        if metrics["step"] == self.at:
            self.act()


def losses(directory: Path) -> list[float]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [json.loads(line)["loss"] for line in lines]


def steps_done(directory: Path) -> int:
    path = directory / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_twenty_kills_at_random_moments_leave_the_same_bytes(recipe: Recipe, undisturbed: Path, tmp_path: Path) -> None:
    directory, draw = tmp_path / "killed", random.Random(5)
    job, kills = replace(recipe, output=str(directory)), 0
    while not (directory / "adapter").is_dir():
        child = os.fork()
        if child == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                resume(directory) if (directory / "run.json").is_file() else tune(job)
                code = 0
            finally:
                os._exit(code)
        if kills < KILLS:
            goal = steps_done(directory) + draw.choice((0, 1, 1, 2, 3))
            while steps_done(directory) < goal and os.waitpid(child, os.WNOHANG) == (0, 0):
                time.sleep(0.001)
            time.sleep(draw.random() * 0.02)
            if (directory / "run.json").is_file():
                os.kill(child, signal.SIGKILL)
                kills += 1
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    assert kills == KILLS
    assert adapter(directory) == adapter(undisturbed)
    assert losses(directory) == losses(undisturbed)


def test_a_signal_saves_and_says_how_to_go_on(recipe: Recipe, undisturbed: Path, tmp_path: Path) -> None:
    directory = tmp_path / "stopped"
    stop = At(7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match=r"after step 7 of 50; trimtab tune --resume"):
        tune(replace(recipe, output=str(directory), save_every=0), stop)
    with pytest.raises(UserError, match="unfinished run"):
        tune(replace(recipe, output=str(directory)))
    result = resume(directory)
    assert adapter(directory) == adapter(undisturbed)
    assert losses(directory) == losses(undisturbed)
    assert result.record["status"] == "finished"
    assert not (directory / checkpoint.FOLDER).exists()
    with pytest.raises(UserError, match="is finished"):
        resume(directory)


def stopped_at(recipe: Recipe, directory: Path, step: int) -> None:
    class Crash(Exception):
        pass

    def crash() -> None:
        raise Crash

    with pytest.raises(Crash):
        tune(replace(recipe, output=str(directory)), At(step, crash))


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "record"])
def test_a_damaged_checkpoint_is_passed_over(recipe: Recipe, undisturbed: Path, tmp_path: Path, damage: str) -> None:
    directory = tmp_path / "damaged"
    stopped_at(recipe, directory, 9)
    newest, older = checkpoint.found(directory)
    tensors = newest / checkpoint.TENSORS
    content = bytearray(tensors.read_bytes())
    if damage == "cut":
        tensors.write_bytes(content[:-10])
    elif damage == "flipped":
        content[-5] ^= 1
        tensors.write_bytes(content)
    elif damage == "missing":
        tensors.unlink()
    else:
        (newest / checkpoint.RECORD).write_text("{")
    found, problems = checkpoint.newest(directory)
    assert found is not None
    assert older.name == f"step-{found.step:08d}"
    assert newest.name in problems[0]
    resume(directory)
    assert adapter(directory) == adapter(undisturbed)


def test_a_half_written_checkpoint_does_not_count(recipe: Recipe, undisturbed: Path, tmp_path: Path) -> None:
    directory = tmp_path / "half"
    stopped_at(recipe, directory, 5)
    newest = checkpoint.found(directory)[0]
    newest.rename(newest.with_name(f".{newest.name}.partial"))
    resume(directory)
    assert adapter(directory) == adapter(undisturbed)


def test_other_data_or_another_base_is_refused(recipe: Recipe, rows: Path, tmp_path: Path) -> None:
    directory, data = tmp_path / "changed", tmp_path / "rows.jsonl"
    data.write_bytes(rows.read_bytes())
    stopped_at(replace(recipe, data=str(data)), directory, 3)
    lines = data.read_text().splitlines()
    data.write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(UserError, match="data"):
        resume(directory)
    assert checkpoint.found(directory)


def test_no_more_checkpoints_are_kept_than_asked_for(recipe: Recipe, tmp_path: Path) -> None:
    directory = tmp_path / "kept"
    stopped_at(replace(recipe, keep=3), directory, 8)
    assert [path.name for path in checkpoint.found(directory)] == [f"step-{step:08d}" for step in (7, 6, 5)]


def test_the_best_adapter_is_kept_and_patience_ends_the_run(recipe: Recipe, tmp_path: Path) -> None:
    directory = tmp_path / "best"
    wild = replace(recipe, output=str(directory), learning_rate=0.5, evaluate_every=2, patience=3, steps=80)
    result = tune(replace(wild, schedule="constant"))
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    measured = {line["step"]: line["heldout_loss"] for line in lines if "heldout_loss" in line}
    best = min(measured, key=lambda step: measured[step])
    assert lines[-1]["step"] == best + 3 * 2 < 80
    assert result.record["kept_step"] == best
    assert result.after["loss"] == pytest.approx(measured[best], rel=1e-6)


def test_a_run_with_a_best_adapter_resumes_to_the_same_bytes(recipe: Recipe, tmp_path: Path) -> None:
    found = []
    for name, step in (("whole", None), ("broken", 11)):
        directory = tmp_path / name
        job = replace(recipe, output=str(directory), evaluate_every=3, learning_rate=0.3, steps=20)
        if step is None:
            tune(job)
        else:
            stopped_at(job, directory, step)
            resume(directory)
        found.append(adapter(directory))
    assert found[0] == found[1]


def test_rows_that_make_a_loss_infinite_are_named(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.train import run

    plain = run.loss_sum
    word: list[int] = []

    def poisoned(model: Any, batch: Any, task: str) -> Any:
        loss, outputs = plain(model, batch, task)
        if not word:
            word.append(int(batch.ids[0, -1]))
        return (loss * float("nan") if bool((batch.ids == word[0]).any()) else loss), outputs

    monkeypatch.setattr(run, "loss_sum", poisoned)
    with pytest.raises(UserError, match=r"step 1: loss nan.*rows \d"):
        tune(replace(recipe, output=str(tmp_path / "nan")))


def test_a_changed_chat_template_is_refused_where_the_run_is_used(recipe: Recipe, model: Path, tmp_path: Path) -> None:
    from trimtab.train.rundir import open_run

    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    directory = tmp_path / "run"
    tune(replace(recipe, model=str(copy), output=str(directory), steps=2))
    assert open_run(directory).load("cpu")[0] is not None
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with pytest.raises(UserError, match="chat template is not the one"):
        open_run(directory).load("cpu")


def test_what_a_method_draws_anew_is_forgotten_by_the_optimizer(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ages: list[set[int]] = []
    plain = checkpoint.snapshot

    def look(model: Any, optimizer: Any, *more: Any) -> Any:
        ages.append({int(state["step"]) for state in optimizer.state.values()})
        return plain(model, optimizer, *more)

    monkeypatch.setattr(checkpoint, "snapshot", look)
    job = replace(recipe, method="relora", settings={"rank": 2, "every": 3, "restarts": 1}, steps=5)
    tune(replace(job, output=str(tmp_path / "rounds")))
    assert ages == [{1}, {2}, set(), {1}, {2}]
