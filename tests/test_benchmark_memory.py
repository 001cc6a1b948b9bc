"""The memory table: which cells are run, again or not, and what is written when it is stopped."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def table() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "memory" / "table.py"
    spec = importlib.util.spec_from_file_location("memory_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_model_has_every_point(table: ModuleType) -> None:
    found = list(table.cells(["smollm2-135m-instruct", "minilm-l6"], ["lora"], list(table.POINTS), False))
    points = [(cell["model"], cell["rows"], cell["length"]) for cell in found]
    assert points[3:] == [("minilm-l6", 8, 64), ("minilm-l6", 4, 256), ("minilm-l6", 2, 512)]
    assert len(points) == 6


@pytest.mark.parametrize(
    ("found", "again", "done"),
    [
        (None, False, False),
        ({"live": {}}, True, True),
        ({"skipped": "UserError: no"}, False, True),
        ({"skipped": "UserError: no"}, True, False),
        ({"failed": "killed by signal 9"}, False, False),
    ],
)
def test_what_is_run_again(table: ModuleType, found: Any, again: bool, done: bool) -> None:
    assert table.is_done(found, again) is done


@pytest.mark.parametrize(
    ("code", "told", "kept"),
    [
        (1, "trimtab.core.errors.UserError: recipe: no", {"skipped": "trimtab.core.errors.UserError: recipe: no"}),
        (1, "RuntimeError: out of memory", {"failed": "RuntimeError: out of memory"}),
        (-9, "", {"failed": "killed by signal 9"}),
    ],
)
def test_a_refusal_is_not_a_failure(
    table: ModuleType, monkeypatch: pytest.MonkeyPatch, code: int, told: str, kept: dict[str, str]
) -> None:
    done = subprocess.CompletedProcess([], code, "", f"Traceback:\n{told}\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert table.measured({"model": "m"}, 3) == {"model": "m", **kept}


def test_a_write_that_fails_leaves_the_old_file(
    table: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    table.write(tmp_path / "memory.json", "old")

    def full(*_: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        table.write(tmp_path / "memory.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["memory.json"]
    assert (tmp_path / "memory.json").read_text() == "old"


@pytest.mark.parametrize("name", ["lisa", "badam"])
def test_what_trains_changes_within_three_steps(table: ModuleType, name: str, tmp_path: Path) -> None:
    from trimtab.train.updates import schedule_of

    recipe = table.recipe_of({"model": "smollm2-135m-instruct", "name": name, "rows": 1, "length": 8}, tmp_path, 3)
    schedule = schedule_of(recipe)
    assert schedule is not None
    assert len({schedule.on(step, 30, 0) for step in range(3)}) > 1
