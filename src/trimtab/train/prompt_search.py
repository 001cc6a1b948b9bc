"""Search for the tokens of an AutoPrompt: gradients propose, the exact loss decides, no weight changes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.hosts import frozen_base
from trimtab.core.method import Method
from trimtab.core.places import Place
from trimtab.core.registry import name_of
from trimtab.core.save import deltas_of
from trimtab.core.state import check_names, require_state
from trimtab.data.batches import batches
from trimtab.engine.loss import loss_sum, terms_of
from trimtab.train import rundir
from trimtab.train.interrupt import Interrupt, Stopped

if TYPE_CHECKING:
    from trimtab.train.job import Job
    from trimtab.train.reporter import Reporter


@dataclass(frozen=True)
class Tried:
    """One step: the loss before and after on the rows that decide, and the tokens after it."""

    before: float
    after: float
    tokens: tuple[int, ...]
    choice: tuple[int, int, int]
    """Which site, which place of its trigger, and the token that stands there now."""


def is_searched(method: Method) -> bool:
    """Whether a method is searched for instead of trained."""
    return name_of(type(method)) == "auto_prompt"


def search_prompt(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    steps: int = 100,
    banned: Sequence[int] = (),
    seed: int = 0,
    name: str = "default",
) -> list[Tried]:
    """Improve the tokens of an attached AutoPrompt in place; `loss(model, batch)` is the mean loss of a batch.

    Step i takes gradients on batch i and decides on batch i + 1, in turn; `banned` ids are never tried.
    """
    if not batches:
        raise UserError("search_prompt: no batches were given")
    pairs = ((batches[step % len(batches)], batches[(step + 1) % len(batches)]) for step in range(steps))
    return list(tries(model, pairs, loss, banned, seed, name))


def tries(
    model: nn.Module,
    pairs: Iterator[tuple[Any, Any]],
    loss: Callable[[nn.Module, Any], Tensor],
    banned: Sequence[int],
    seed: int,
    name: str = "default",
    made: Sequence[Sequence[int]] = (),
) -> Iterator[Tried]:
    """One step of the search for every pair of batches: one for the gradient, one to decide on.

    `made` are the choices of earlier steps, which are taken as they are; `pairs` are those of the steps after them.
    """
    sites = list(sites_of(model, name))
    draw = torch.Generator().manual_seed(seed)

    def drawn() -> tuple[int, int]:
        site = int(torch.randint(len(sites), (), generator=draw))
        return site, int(torch.randint(sites[site][2].length, (), generator=draw))

    for site, at, token in made:
        if drawn() != (site, at):
            raise UserError("search_prompt: the steps made so far are those of another search", fix="begin it anew")
        place, delta, _ = sites[site]
        with torch.no_grad():
            put(delta, frozen_base(model.get_submodule(place.module), place), at, token)
    for gradient_batch, judging_batch in pairs:
        model.zero_grad()
        loss(model, gradient_batch).backward()
        site, at = drawn()
        place, delta, method = sites[site]
        base = frozen_base(model.get_submodule(place.module), place)
        with torch.no_grad():
            W = base.weight
            proposed = method.best(delta, W, at, torch.tensor(list(banned), dtype=torch.long, device=W.device))
            before = after = float(loss(model, judging_batch))
            chosen = int(delta.t[at])
            for token in proposed.tolist():
                put(delta, base, at, token)
                found = float(loss(model, judging_batch))
                if found < after:
                    after, chosen = found, token
            put(delta, base, at, chosen)
        model.zero_grad()
        yield Tried(before, after, tuple(delta.t.tolist()), (site, at, chosen))


def sites_of(model: nn.Module, name: str) -> Iterator[tuple[Place, Any, Any]]:
    """Place, tensors and method of every searched site of an adapter."""
    state = require_state(model, "search_prompt")
    check_names(state, [name], "search_prompt")
    parts = [part for part in state.adapters[name].parts if is_searched(part.method)]
    if not parts:
        raise UserError(
            f"search_prompt: adapter {name!r} holds no AutoPrompt", fix="trimtab.attach(model, trimtab.AutoPrompt())"
        )
    for part in parts:
        for place, delta in zip(part.places, deltas_of(model, state, name, part), strict=True):
            yield place, delta, part.method


def put(delta: Any, base: Any, at: int, token: int) -> None:
    """Make a token the trigger's at one place."""
    delta.t[at] = token
    delta.E[at] = base(delta.t[at : at + 1])[0].to(delta.E)


def search(job: Job, tell: Reporter) -> list[dict[str, Any]]:
    """The search in a run, in place of `trimtab.train.run.train`; one that was stopped goes on from its own metrics."""
    recipe, model = job.recipe, job.model
    rows_per_step = recipe.batch_size * recipe.accumulation
    lines = rundir.cut_metrics(job.directory)
    if any("choice" not in line for line in lines):  # a run of before searches could go on
        lines = rundir.cut_metrics(job.directory, 0)
    begun = len(lines)
    if lines:
        tell.note(f"going on after step {begun} of {job.steps}")

    def chosen() -> Iterator[Any]:
        for step in range(begun, job.steps + 1):
            epoch, at = divmod(step, job.steps_per_epoch)
            yield job.batch(batches(job.train_rows, rows_per_step, recipe.seed, epoch)[at])

    def pairs() -> Iterator[tuple[Any, Any]]:
        found = chosen()
        last = next(found)
        for batch in found:
            yield last, batch
            last = batch

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return loss_sum(model, batch, job.task)[0] / terms_of(batch)

    model.eval()  # the same loss for the same tokens
    tell.start(job.steps, job.steps * rows_per_step, done=(begun, begun * rows_per_step))
    started, before = time.perf_counter(), lines[-1]["seconds"] if lines else 0.0
    banned = getattr(job.tokenizer, "all_special_ids", ())
    made = [line["choice"] for line in lines]
    with open(job.directory / rundir.METRICS, "a", encoding="utf-8") as log, Interrupt() as interrupt:
        found = tries(model, pairs(), loss, banned, recipe.seed, made=made)
        for step, tried in enumerate(found, begun + 1):
            seconds, rows = before + time.perf_counter() - started, step * rows_per_step
            line = {
                "step": step,
                "epoch": round(step / job.steps_per_epoch, 4),
                "loss": tried.after,
                "learning_rate": 0.0,
                "gradient_norm": 0.0,
                "rows": rows,
                "seconds": round(seconds, 3),
                "rows_per_second": round(rows / seconds, 3),
                "loss_before": tried.before,
                "tokens": list(tried.tokens),
                "choice": list(tried.choice),
            }
            lines.append(line)
            log.write(json.dumps(line) + "\n")
            log.flush()
            tell.step(line)
            if interrupt.asked and step < job.steps:
                raise Stopped(f"stopped after step {step} of {job.steps}; trimtab tune --resume {job.directory}")
    job.record["kept_step"] = len(lines)
    return lines


def wording(model: nn.Module, tokenizer: Any, name: str = "default") -> str | None:
    """The tokens of a searched prompt as text; None where there is none."""
    parts = require_state(model, "search_prompt").adapters[name].parts
    if not any(is_searched(part.method) for part in parts):
        return None
    return " | ".join(tokenizer.decode(delta.t.tolist()) for _, delta, _ in sites_of(model, name))
