"""Checkpoints written beside the training: a step waits for a copy of the state, not for the disk."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.train import checkpoint

LARGE = 256 << 20
"""Bytes of a state that is not copied: it is written while the step waits, rather than held twice."""


class Writer:
    """Writes one checkpoint at a time in a thread of its own; what goes wrong there is told at the next call."""

    def __init__(self, run: Path, keep: int) -> None:
        self.run, self.keep = run, keep
        self.pool: ThreadPoolExecutor | None = None
        self.pending: Future[None] | None = None

    def write(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        step: int,
        counters: Mapping[str, Any],
        best: Mapping[str, Tensor],
    ) -> None:
        """Take the state and have it written; the one before is on disk when this returns, or its error is raised."""
        self.wait()
        made = checkpoint.snapshot(model, optimizer, step, counters, best)
        if made.nbytes >= LARGE:
            checkpoint.store(self.run, made, self.keep)
            return
        self.pool = self.pool or ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending = self.pool.submit(checkpoint.store, self.run, made.copied(), self.keep)

    def wait(self) -> None:
        """Return when everything is on disk; raises what went wrong."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *unused: Any) -> None:
        """End the thread, and what it writes with it; an error on the way out is not hidden by one of writing."""
        with suppress(UserError):
            self.wait()
        if self.pool is not None:
            self.pool.shutdown()
