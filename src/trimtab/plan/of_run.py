"""The memory that a run is about to need, predicted from its own heaviest batch before it trains."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from trimtab.core.errors import UserError
from trimtab.data.batches import batches
from trimtab.plan.dry_run import dry_run, prepared
from trimtab.plan.planning import beside, new_modules_of, plain_of, read_outline
from trimtab.plan.process import Room, passing
from trimtab.train.recipe import Recipe

LOOKED_AT = 10_000
"""Rows of either part whose tokens are looked at: more hardly hold others."""
FAILURES = (UserError, RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, LookupError)
"""What a model or method may do on the meta device; a run goes on without its prediction."""


def predicted(job: Any) -> dict[str, Any]:
    """`predicted_bytes` of a prepared job's process and its parts by category, or `reason` why there are none.

    The step is that of the first epoch's heaviest batch. Global random state is left as it was.
    """
    if job.recipe.compile != "off":
        return {"predicted_bytes": None, "reason": "what compiled blocks keep is the compiler's choice"}
    started = time.perf_counter()
    recipe, kind = replace(job.recipe, steps=job.steps), "cuda" if job.device.type == "cuda" else "cpu"
    outputs = len(job.train_rows.labels) if job.task == "classify" else None
    try:
        with torch.random.fork_rng(devices=[]):
            live, through = step_of(job, recipe, outputs), 0
            plain = plain_of(recipe)
            if kind == "cpu" and plain != recipe:
                through = passing(step_of(job, plain, outputs))
            blank = read_outline(recipe, job.task, outputs)
            extra = beside(recipe, live, blank, Room("", 0, kind), model_dtype(job), through, tokens_of(job))
    except FAILURES as error:
        return {"predicted_bytes": None, "reason": f"{type(error).__name__}: {error}".splitlines()[0]}
    parts = {**live, **{name: round(size) for name, size in extra.items()}}
    if kind == "cpu" and job.no_bottom() is None:
        parts["bottom"] = job.bottom_bytes()
    spent = round(time.perf_counter() - started, 3)
    return {"predicted_bytes": sum(parts.values()), "predicted": parts, "seconds": spent}


def step_of(job: Any, recipe: Recipe, outputs: int | None) -> dict[str, int]:
    """Living bytes by category at the highest point of the heaviest step."""
    model = read_outline(recipe, job.task, outputs).to(model_dtype(job))
    length = max(len(row.ids) for row in job.train_rows)
    bench = prepared(recipe, model, job.task, new_modules_of(model, job.task), length)
    bench.packed, bench.seam, bench.group = job.packing != "off", job.seam, job.group
    return dry_run(bench, heaviest(job)).live


def tokens_of(job: Any) -> set[int]:
    """The ids that the rows of a run hold, of many rows the first ones."""
    rows = (row for part in (job.train_rows, job.heldout_rows) for row in islice(part, LOOKED_AT))
    return {token for row in rows for token in row.ids}


def model_dtype(job: Any) -> torch.dtype:
    """The floating type of the frozen weights."""
    found: torch.dtype = getattr(torch, job.record["model"]["dtype"])
    return found


def heaviest(job: Any) -> Any:
    """The micro-batch of most tokens in the first epoch."""
    size, padded = job.recipe.batch_size, job.packing == "off"
    order = batches(job.train_rows, size * job.recipe.accumulation, job.recipe.seed, 0, by_length=padded)
    micro = [rows[at : at + size] for rows in order[: job.steps] for at in range(0, len(rows), size)]

    def tokens(rows: Any) -> int:
        lengths = [len(job.train_rows[row].ids) for row in rows]
        return max(lengths) * len(lengths) if padded else sum(lengths)

    rows = max(micro, key=tokens)
    return job.together([job.train_rows[row] for row in rows])
