"""`trimtab tune --nproc`: several processes from one command, one answer; the loss of one of them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tests.cli.conftest import Outcome
from tests.train.processes import Asked, together

from trimtab.cli.launch import cause, without_own
from trimtab.cli.tune import command

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available() or not Path("/proc").is_dir(), reason="needs gloo and /proc"
)
SETTINGS = "--steps 40 --save-every 5 --rank 2 --dropout 0.1 --heldout 4 --device cpu --dtype float32".split()
LINES = 17
"""Steps after which something happens to a process."""


class Started:
    """A command line in a process of its own."""

    def __init__(self, environment: Mapping[str, str], *arguments: str | Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trimtab", "tune", *map(str, arguments)],
            env=dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def rank(self, number: int) -> int:
        """The process id of a rank."""
        for folder in Path("/proc").iterdir():
            try:
                if int((folder / "stat").read_text().split(") ")[-1].split()[1]) != self.process.pid:
                    continue
                if f"RANK={number}" in (folder / "environ").read_text().split("\0"):
                    return int(folder.name)
            except (OSError, ValueError):
                continue
        raise AssertionError(f"no rank {number}")

    def send(self, number: int, run: Path) -> None:
        """A signal to the second process, when some steps are done."""
        path = run / "metrics.jsonl"
        while not path.is_file() or path.read_bytes().count(b"\n") < LINES:
            assert self.process.poll() is None
            time.sleep(0.002)
        os.kill(self.rank(1), number)

    def end(self, seconds: float = 90) -> Outcome:
        out, err = self.process.communicate(timeout=seconds)
        return Outcome(self.process.returncode, out, err)


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter.safetensors").read_bytes()


def test_the_help_names_the_flags() -> None:
    names = {option for parameter in command.params for option in parameter.opts}
    assert {"--nproc", "--restarts"} <= names


def test_the_started_processes_get_the_rest_of_the_line() -> None:
    line = ["a.yaml", "--nproc", "2", "--rank", "4", "--restarts=3", "--json"]
    assert without_own(line) == ["a.yaml", "--rank", "4", "--json"]


def test_the_cause_is_what_was_killed_where_nobody_told_more(tmp_path: Path) -> None:
    assert "1 of 2 by SIGKILL" in str(cause(tmp_path, {0: -signal.SIGTERM, 1: -signal.SIGKILL}, 2))


def test_an_error_of_all_processes_is_told_once(
    source_environment: dict[str, str], chat_model: Path, prompts: Path, tmp_path: Path
) -> None:
    where = ["--model", chat_model, "--data", prompts, "--output", tmp_path / "run", *SETTINGS]
    found = Started(source_environment, *where, "--method", "lora", "--optimizer", "lomo", "--nproc", "2").end()
    assert found.code == 2
    assert found.err.count("error:") == 1
    assert "several processes does not go with an optimizer that steps in backward" in found.err
    assert "Traceback" not in found.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "full"])
def test_a_killed_process_is_started_again_and_nothing_is_lost(
    shard: str, source_environment: dict[str, str], chat_model: Path, prompts: Path, tmp_path: Path
) -> None:
    where = ["--model", chat_model, "--data", prompts, *SETTINGS, "--nproc", "2", "--shard", shard]
    whole = Started(source_environment, *where, "--output", tmp_path / "whole").end()
    assert whole.code == 0, whole.err
    killed = Started(source_environment, *where, "--output", tmp_path / "killed", "--restarts", "2")
    killed.send(signal.SIGKILL, tmp_path / "killed")
    found = killed.end()
    assert found.code == 0, found.err
    assert adapter(tmp_path / "killed") == adapter(tmp_path / "whole")


@pytest.mark.slow
def test_without_restarts_the_loss_is_told_and_any_number_goes_on_past_a_damaged_checkpoint(
    source_environment: dict[str, str], chat_model: Path, prompts: Path, tmp_path: Path
) -> None:
    plain = ["0" if one == "0.1" else one for one in SETTINGS]
    # At its default rate this tiny model's run is chaotic: a last bit of a sum grows to 0.2 in 30 steps on some CPUs.
    where = ["--model", chat_model, "--data", prompts, *plain, "--learning-rate", "0.001"]
    run = tmp_path / "run"
    started = Started(source_environment, *where, "--nproc", "2", "--output", run)
    started.send(signal.SIGKILL, run)
    found = started.end()
    assert found.code == 2
    assert found.err.count("error:") == 1
    assert "a process was killed: 1 of 2 by SIGKILL" in found.err
    assert not (run / "adapter").exists()
    newest = max((run / "checkpoints").iterdir()) / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7])
    shutil.copytree(run, tmp_path / "alone")
    again = Started(source_environment, "--resume", run, "--nproc", "2").end()
    assert again.code == 0, again.err
    assert "is damaged" in again.out
    alone = Started(source_environment, "--resume", tmp_path / "alone").end()
    assert alone.code == 0, alone.err
    from safetensors.torch import load

    ours, theirs = load(adapter(run)), load(adapter(tmp_path / "alone"))
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) <= 1e-5


@pytest.mark.slow
def test_a_process_that_stands_still_is_an_error_and_no_hang(
    source_environment: dict[str, str], chat_model: Path, prompts: Path, tmp_path: Path
) -> None:
    where = ["--model", chat_model, "--data", prompts, *SETTINGS, "--output", tmp_path / "run"]
    started = Started(source_environment, *where, "--nproc", "2", "--timeout", "5")
    started.send(signal.SIGSTOP, tmp_path / "run")
    found = started.end()
    assert found.code == 2
    assert found.err.count("error:") == 1
    assert "another process of this run has not answered for 5 s" in found.err


@pytest.mark.slow
def test_a_signal_to_the_command_saves_the_run(
    source_environment: dict[str, str], chat_model: Path, prompts: Path, tmp_path: Path
) -> None:
    where = ["--model", chat_model, "--data", prompts, *SETTINGS, "--output", tmp_path / "run"]
    started = Started(source_environment, *where, "--nproc", "2", "--steps", "4000")
    started.send(signal.SIGCONT, tmp_path / "run")  # waits until it trains
    started.process.send_signal(signal.SIGINT)
    found = started.end()
    assert found.code == 130
    assert "trimtab tune --resume" in found.err
    assert list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.slow
def test_four_processes_on_two_machines_train_what_one_does(chat_model: Path, prompts: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from safetensors.torch import load

    from trimtab.train.recipe import recipe_from
    from trimtab.train.run import tune

    values = {"model": str(chat_model), "data": str(prompts), "rank": 4, "device": "cpu", "dtype": "float32"}
    values |= {"steps": 20, "learning_rate": 1e-3, "save_every": 0, "quantize": "nf4"}
    tune(replace(recipe_from(values), output=str(tmp_path / "alone")))
    jobs = {shard: Asked({**values, "shard": shard}, machines=2) for shard in ("none", "full", "hybrid")}
    assert together(jobs, tmp_path, 4) == {name: ["done"] * 4 for name in jobs}
    theirs = load(adapter(tmp_path / "alone"))
    for name in jobs:
        ours = load(adapter(tmp_path / name))
        assert ours.keys() == theirs.keys()
        assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) <= 1e-5, name
