"""Runs in several gloo processes, started once for many recipes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from trimtab.core.errors import UserError
from trimtab.core.save import read_record
from trimtab.train.interrupt import Stopped
from trimtab.train.recipe import recipe_from
from trimtab.train.reporter import Reporter


@dataclass(frozen=True)
class Asked:
    """A recipe, and what goes wrong: `signal:STEP` in the last process, `disk:STEP` in the first."""

    values: Mapping[str, Any]
    fault: str = ""
    resume: bool = False
    machines: int = 1


class Faulty(Reporter):
    """Sends this process a signal after a step. Reporters of other processes are not called, so rank 0 has it."""

    def __init__(self, at: int) -> None:
        self.at = at

    def step(self, metrics: Mapping[str, Any]) -> None:
        if metrics["step"] == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


def together(jobs: Mapping[str, Asked], folder: Path, size: int = 2) -> dict[str, list[str]]:
    """Run every job in `size` processes, its run directory in `folder/<name>`; what each process ended with."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (size, port, dict(jobs), folder), nprocs=size)
    return {name: [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(size)] for name in jobs}


def work(rank: int, size: int, port: int, jobs: dict[str, Asked], folder: Path) -> None:
    """One process: all jobs in order, in one process group."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1", "TRIMTAB_HOME": str(folder / "home")}
    torch.distributed.init_process_group("gloo")
    for name, job in jobs.items():
        os.environ["LOCAL_WORLD_SIZE"] = str(size // job.machines)
        told = ended(job, folder / name)
        (folder / f"{name}.{rank}.json").write_text(json.dumps(told))
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def ended(job: Asked, directory: Path) -> str:
    """Carry out one job; `done`, or the kind of error and its text."""
    from trimtab.train import checkpoint, run

    kind, _, step = job.fault.partition(":")
    store = checkpoint.store

    def full(run: Path, made: checkpoint.Snapshot, keep: int) -> None:
        if made.step >= int(step):
            raise UserError("save: could not write: No space left on device")
        store(run, made, keep)

    if kind == "disk":
        checkpoint.store = full
    try:
        recipe = replace(recipe_from(dict(job.values)), output=str(directory))
        tell = Faulty(int(step)) if kind == "signal" else Reporter()
        run.resume(directory, tell) if job.resume else run.tune(recipe, tell)
        return "done"
    except (Exception, Stopped) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        checkpoint.store = store


def copied(source: Path, target: Path) -> Path:
    """A copy of a run directory, to go on from twice."""
    shutil.copytree(source, target)
    return target


def names(found: Sequence[str]) -> list[str]:
    """The kinds of what processes ended with."""
    return [one.partition(":")[0] for one in found]


def adapter(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter" / "adapter.safetensors")


def apart(one: Path, other: Path) -> float:
    """The largest difference of two adapters, relative above 1 (QAT saves zero points); keys and shapes are equal."""
    ours, theirs = adapter(one), adapter(other)
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    assert read_record(one / "adapter")["base"] == read_record(other / "adapter")["base"]
    pairs = [(ours[key].double(), theirs[key].double()) for key in ours if ours[key].numel()]
    return max(float(((one - other).abs() / other.abs().clamp(min=1)).max()) for one, other in pairs)


def settings_of(method: Any) -> dict[str, Any]:
    """The settings of a small method as a recipe holds them; what is no plain value keeps its default."""
    return {key: value for key, value in vars(method).items() if isinstance(value, int | float | str)}
