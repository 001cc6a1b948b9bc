"""A run of one process pays nothing for what runs of several need."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from trimtab.engine.ranks import ALONE, Ranks
from trimtab.train.prepare import prepare
from trimtab.train.recipe import recipe_from
from trimtab.train.reporter import Reporter
from trimtab.train.run import carry_out

IMPORTS = """
import json, sys, torch, transformers
from pathlib import Path
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
before = set(sys.modules)
from trimtab.train.recipe import recipe_from
from trimtab.train.prepare import prepare
from trimtab.train.run import carry_out
from trimtab.train.reporter import Reporter
carry_out(prepare(recipe_from(json.loads(sys.argv[2])), Reporter()), Reporter())
new = sorted(name for name in set(sys.modules) - before if name.startswith("torch.distributed"))
told = {"new": new, "joined": torch.distributed.is_initialized(), "shards": "trimtab.engine.shards" in sys.modules}
print(json.dumps(told))
"""
PER_STEP = ("total", "any", "add_up", "listed", "seed")


def values(model: Path, rows: Path, output: Path, **more: Any) -> dict[str, Any]:
    return {"model": str(model), "data": str(rows), "output": str(output), "dtype": "float32", "steps": 3, **more}


@pytest.mark.slow
def test_nothing_of_the_distributed_package_is_imported_for_it(model: Path, rows: Path, tmp_path: Path) -> None:
    given = json.dumps(values(model, rows, tmp_path / "run"))
    command = [sys.executable, "-c", IMPORTS, str(model), given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"new": [], "joined": False, "shards": False}


@pytest.mark.slow
def test_what_processes_tell_each_other_takes_no_time_alone(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent: list[float] = []

    def timed(own: Any) -> Any:
        def call(self: Ranks, *given: Any) -> Any:
            started = time.perf_counter()
            try:
                return own(self, *given)
            finally:
                spent.append(time.perf_counter() - started)

        return call

    for name in PER_STEP:
        monkeypatch.setattr(Ranks, name, timed(getattr(Ranks, name)))
    job = prepare(recipe_from(values(model, rows, tmp_path / "run", steps=30)), Reporter())
    assert job.ranks is ALONE
    result = carry_out(job, Reporter())
    assert len(spent) >= 3 * 30
    assert sum(spent) < 0.005 * result.seconds
