"""`trimtab tune --nproc N`: torchrun's own agent starts the command N times on this machine; one answer comes back."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from trimtab.cli.verb import INTERRUPTED, TOLD
from trimtab.core.errors import UserError, listing

OWN_FLAGS = ("--nproc", "--restarts")
PATIENCE = 10
"""Seconds that processes have to end after one of them has failed."""


def launch(arguments: Sequence[str], count: int, restarts: int) -> None:
    """Run `trimtab tune` with these arguments in `count` processes; ends as the run does, with its error or none.

    After the loss of a process all are started again, up to `restarts` times, and go on from the newest checkpoint.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL + 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    known = {field.name for field in dataclasses.fields(LaunchConfig)}
    more: dict[str, Any] = {"shutdown_timeout": PATIENCE} if "shutdown_timeout" in known else {}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=f"trimtab-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        **more,
    )
    with tempfile.TemporaryDirectory() as folder:
        os.environ[TOLD] = folder
        try:
            elastic_launch(config, sys.executable)("-m", "trimtab", "tune", *arguments)
        except ChildFailedError as error:
            ended = {rank: failure.exitcode for rank, failure in error.failures.items()}
            raise cause(Path(folder), ended, count) from None
        except SignalException:
            raise cause(Path(folder), {}, count) from None
        finally:
            del os.environ[TOLD]


def without_own(arguments: Sequence[str]) -> list[str]:
    """The arguments of the started processes: those given, less what only the start is about."""
    kept, skip = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if skip or name in OWN_FLAGS:
            skip = not skip and not equals
        else:
            kept.append(argument)
    return kept


def cause(folder: Path, ended: dict[int, int], count: int) -> BaseException:
    """Why a run ended: the first real error that a process told, else a process that a signal took."""
    told = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    last = max((one["attempt"] for one in told), default=0)
    told = sorted((one for one in told if one["attempt"] == last), key=lambda one: (one["lost"], one["time"]))
    if told and not told[0]["lost"]:
        first = told[0]
        if first["code"] == INTERRUPTED:
            return KeyboardInterrupt(first["message"])
        return UserError(first["message"], fix=first["fix"])
    if told and "not answered" in told[0]["message"]:
        ended = {}  # it was killed for that
    killed = {rank: -code for rank, code in ended.items() if code < 0 and code != -signal.SIGTERM}
    resume = "`trimtab tune --resume RUN_DIR --nproc N` goes on from the last checkpoint"
    if killed:
        names = listing([f"{rank} of {count} by {signal_name(number)}" for rank, number in sorted(killed.items())])
        memory = "; SIGKILL is often the system, out of memory" if 9 in killed.values() else ""
        return UserError(f"a process was killed: {names}{memory}", fix=resume)
    if told:
        return UserError(told[0]["message"], fix=told[0]["fix"])
    return click.exceptions.Exit(1) if ended else KeyboardInterrupt("interrupted")


def signal_name(number: int) -> str:
    """SIGKILL for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
