"""Fine-tuning from a recipe to a run directory: one flat loop, to be read from top to bottom."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trimtab.core.attach import activate
from trimtab.core.delta import Delta
from trimtab.core.errors import UserError, listing
from trimtab.core.mapped import let_go_replaced
from trimtab.core.save import save
from trimtab.core.settle import settle
from trimtab.data.batches import batches
from trimtab.data.mixture import row_name
from trimtab.engine.loss import loss_sum, terms_of
from trimtab.engine.ranks import Ranks, joined
from trimtab.train import base, checkpoint, rundir
from trimtab.train.interrupt import Interrupt, Stopped
from trimtab.train.job import Job
from trimtab.train.prepare import prepare
from trimtab.train.prompt_search import is_searched, search, wording
from trimtab.train.recipe import Recipe
from trimtab.train.reporter import Reporter
from trimtab.train.trackers import names_in, opened
from trimtab.train.updates import Updates, add_penalties
from trimtab.train.writer import Writer

SECONDS_BETWEEN = 60.0
"""Seconds between checkpoints where the recipe does not say."""

RECENT = 40
"""Losses of the last steps in which divergence is looked for."""


@dataclass(frozen=True)
class Result:
    """What a run came to; everything in it is also on disk."""

    directory: Path
    before: dict[str, Any]
    after: dict[str, Any]
    seconds: float
    rows_per_second: float
    peak_memory_bytes: int | None
    trainable: int
    total: int
    record: dict[str, Any]


def tune(recipe: Recipe, reporter: Reporter | None = None) -> Result:
    """Train what the recipe says and write a self-describing run directory.

    Two runs with one recipe on one machine write the same adapter, byte for byte. Bad input raises `UserError` before
    anything is written; Ctrl-C or SIGTERM saves the state and raises `Stopped`, after which `resume` goes on.
    """
    with joined(recipe.device, recipe.timeout) as ranks:
        tell = reporter if reporter is not None and ranks.first else Reporter()
        if ranks.told(lambda: rundir.is_restarted(recipe)):
            return go_on(Path(recipe.output or ""), tell, ranks)
        with ranks.agreeing():
            job = prepare(recipe, tell, ranks=ranks)
        return carry_out(job, tell)


def resume(directory: str | Path, reporter: Reporter | None = None) -> Result:
    """Go on with a run that was stopped or killed, from its newest intact checkpoint; it ends with the same bytes.

    Refused when the model, the data, the tokenizer or what is trained is not what the run began with.
    """
    known = rundir.open_run(directory)
    with joined(known.recipe.device, known.recipe.timeout) as ranks:
        return go_on(Path(directory), reporter if reporter is not None and ranks.first else Reporter(), ranks)


def go_on(directory: Path, tell: Reporter, ranks: Ranks) -> Result:
    """Prepare a run anew from its directory, compare it with what it began with, and carry it out."""
    with ranks.agreeing():
        job = prepared_again(directory, tell, ranks)
    return carry_out(job, tell)


def prepared_again(directory: Path, tell: Reporter, ranks: Ranks) -> Job:
    """The job of a run that was begun before; refused where it is another one now."""
    known = rundir.open_run(directory)
    if known.record.get("status") == "finished":
        raise UserError(f"resume: {directory} is finished", fix=f"trimtab chat {directory}")
    job = prepare(known.recipe, tell, directory, ranks=ranks)
    job.record |= {"before": known.record["before"]}
    record = json.loads(json.dumps(job.record))
    fixed = ("model", "data", "method", "learning_rate", "steps")
    changed = [key for key in fixed if record[key] != known.record[key]]
    if record["rate_ratios"] != known.record.get("rate_ratios", {}):
        changed.append("the rates of the parts")
    if changed:
        raise UserError(
            f"resume: {listing(changed)} differ from what {directory} began with", fix="undo the change, or train anew"
        )
    if job.record["versions"] != known.record["versions"]:
        tell.note("other versions than the run began with: the result may differ in its last digits")
    if job.record.get("processes", 1) != known.record.get("processes", 1):
        tell.note("another number of processes than the run began with: the result may differ in its last digits")
    return job


def carry_out(job: Job, tell: Reporter) -> Result:
    """Measure, train, measure, save."""
    record, recipe, ranks = job.record, job.recipe, job.ranks
    if "memory" not in record and ranks.size == 1:
        tell.stage("predicting the memory")
        record["memory"] = memory_of(job)
    if job.sharded:
        with ranks.agreeing():
            from trimtab.engine.shards import shard

            shard(job.model, recipe.shard, job.device, ranks, job.slices)
    with job.running():
        if "before" not in record:
            tell.stage("measuring the untuned model")
            activate(job.model, None)
            record["before"] = job.measure_each()
            activate(job.model, "default")
            let_go_replaced(job.model)
            ranks.told(lambda: started(job, record))
        tell.evaluated("before", record["before"])

        searched = any(is_searched(delta.method) for delta in job.model.modules() if isinstance(delta, Delta))
        metrics = search(job, tell) if searched else train(job, tell)

        tell.stage("measuring the tuned model")
        record["after"] = job.measure_each()
        tell.evaluated("after", record["after"])
    notes = {"tokenizer": job.train_rows.report.fingerprint, "base": record["model"]["fingerprint"]}
    notes |= {"dtype": record["model"]["dtype"]}
    prompt = wording(job.model, job.tokenizer)
    notes |= {"prompt": prompt} if prompt is not None else {}
    notes |= {"context": recipe.context} if recipe.context is not None else {}
    ranks.told(lambda: str(save(job.model, job.directory / rundir.ADAPTER, bake=recipe.bake, notes=notes)))
    heldout = [(0, record["before"]["loss"])]
    heldout += [(line["step"], line["heldout_loss"]) for line in metrics if "heldout_loss" in line]
    seconds, rows = metrics[-1]["seconds"] + record.get("bottom_seconds", 0.0), metrics[-1]["rows"]
    record |= {
        "status": "finished",
        "seconds": round(seconds, 3),
        "rows_per_second": round(rows / seconds, 3),
        "peak_memory_bytes": rundir.peak_memory(),
    }
    if "memory" in record:
        record["memory"]["measured_bytes"] = record["peak_memory_bytes"]
    ranks.told(lambda: rundir.write_record(job.directory, record))
    if ranks.first:
        checkpoint.clear(job.directory)
        try:
            rundir.plot_loss(job.directory, metrics, [*heldout, (record["kept_step"], record["after"]["loss"])])
        except UserError as error:
            tell.note(f"the run is complete, but without its plot: {error.message}")
    result = Result(
        directory=job.directory,
        before=record["before"],
        after=record["after"],
        seconds=seconds,
        rows_per_second=rows / seconds,
        peak_memory_bytes=record["peak_memory_bytes"],
        trainable=record["trainable"],
        total=record["total"],
        record=record,
    )
    tell.finish(result)
    return result


def started(job: Job, record: dict[str, Any]) -> None:
    """The first files of a run directory; its record comes last, as the sign that all are there."""
    if job.codes is not None:
        base.keep(job.directory, job.codes)
    rundir.write_start(job.directory, job.recipe, record)


def memory_of(job: Job) -> dict[str, Any]:
    """The predicted memory of a job."""
    from trimtab.plan.of_run import predicted  # which plans with functions of this package

    return predicted(job)


def train(job: Job, tell: Reporter) -> list[dict[str, Any]]:
    """The loop: every step sums gradients over its rows and divides by the trained terms of all of them.

    It begins at the newest checkpoint of the run directory, if there is one. With `evaluate_every`, the adapter of the
    lowest held-out loss is what remains at the end.
    """
    recipe, model, ranks = job.recipe, job.model, job.ranks
    deltas = [module for module in model.modules() if isinstance(module, Delta)]
    update = Updates(recipe, model, job.rate, job.ratios)
    optimizer = update.optimizer
    rows_per_step = recipe.batch_size * recipe.accumulation
    step, counters = 0, dict[str, Any](rows=0, seconds=0.0, best_loss=math.inf, best_step=0, last_losses=[])
    best: dict[str, torch.Tensor] = {}
    saved, problems = checkpoint.newest(job.directory, ranks)
    for problem in problems:
        tell.note(problem)
    if saved is not None:
        best = checkpoint.restore(saved, model, optimizer)
        step, counters = saved.step, saved.counters
        tell.note(f"going on after step {step} of {job.steps}")
    metrics = ranks.told(lambda: rundir.cut_metrics(job.directory, step))
    model.train()
    tell.start(job.steps, job.steps * rows_per_step, done=(step, counters["rows"]))
    trackers = opened(names_in(recipe.track) if ranks.first else [], job.directory, job.record)
    before = counters["seconds"]
    lines = job.directory / rundir.METRICS if ranks.first else os.devnull
    writing = Writer(job.directory, recipe.keep)
    with job.on_bottom(tell), open(lines, "a", encoding="utf-8") as log, Interrupt() as interrupt, writing as writer:
        started = last_saved = time.perf_counter()
        while step < job.steps:
            epoch, padded = step // job.steps_per_epoch, job.packing == "off"
            order = batches(job.train_rows, rows_per_step, recipe.seed, epoch, by_length=padded)
            for rows in order[step % job.steps_per_epoch :][: job.steps - step]:
                micro = job.passes(rows)
                terms = ranks.total(sum(terms_of(batch) * counts for batch, counts in micro))
                update.begin(step, job.rate * factor_at(step, job.steps, recipe))
                ranks.seed(recipe.seed, step)
                for _ in update.passes():
                    loss = 0.0
                    for batch, counts in micro:
                        summed, outputs = loss_sum(model, batch, job.task)
                        (summed * counts / terms).backward()
                        loss += float(summed.detach()) * counts / terms
                        del summed, outputs  # their graph knows tensors in the old shape, which `settle` may change
                    loss = ranks.add_up(update.trained, loss)
                    add_penalties(deltas)

                norm = update.clip()
                refuse_divergence(job, step, loss, norm, counters["last_losses"], rows)
                optimizer.step()
                step += 1
                settle(model, step, partial(job.measure_again, step=step))
                for delta in deltas:
                    delta.method.on_step(delta, step)
                    for tensor in delta.method.stale(delta, step):
                        optimizer.state.pop(tensor, None)
                optimizer.zero_grad(set_to_none=True)

                counters["rows"] += len(rows)
                counters["seconds"] = before + time.perf_counter() - started
                counters["last_losses"] = [*counters["last_losses"], loss][-RECENT:]
                line = {
                    "step": step,
                    "epoch": round(step / job.steps_per_epoch, 4),
                    "loss": loss,
                    "learning_rate": optimizer.param_groups[0]["lr"],
                    "gradient_norm": norm,
                    "rows": counters["rows"],
                    "seconds": round(counters["seconds"], 3),
                    "rows_per_second": round(counters["rows"] / counters["seconds"], 3),
                }
                if recipe.evaluate_every and (step % recipe.evaluate_every == 0 or step == job.steps):
                    line["heldout_loss"] = job.measure()["loss"]
                    tell.evaluated(f"step {step}", {"loss": line["heldout_loss"]})
                    if line["heldout_loss"] < counters["best_loss"]:
                        counters |= {"best_loss": line["heldout_loss"], "best_step": step}
                        best = checkpoint.taken(model)
                metrics.append(line)
                log.write(json.dumps(line) + "\n")
                log.flush()
                tell.step(line)
                for tracker in trackers:
                    tracker.log({key: value for key, value in line.items() if key != "step"}, step)

                stopping, saving = ranks.any(interrupt.asked, ranks.first and due(recipe, step, last_saved))
                if stopping or saving:
                    ranks.told(partial(writer.write, model, optimizer, step, counters, best))
                    last_saved = time.perf_counter()
                if stopping and step < job.steps:
                    ranks.told(writer.wait)
                    raise Stopped(f"stopped after step {step} of {job.steps}; trimtab tune --resume {job.directory}")
                if out_of_patience(recipe, step, counters["best_step"]):
                    tell.note(f"stopping early: no better held-out loss since step {counters['best_step']}")
                    break
            if out_of_patience(recipe, step, counters["best_step"]):
                break
        ranks.told(writer.wait)
    update.close()
    for tracker in trackers:
        tracker.close()
    if best:
        checkpoint.put(model, best)
    settle(model, None, partial(job.measure_again, step=step))
    job.record["kept_step"] = counters["best_step"] if best else step
    return metrics


def due(recipe: Recipe, step: int, last_saved: float) -> bool:
    """Whether a checkpoint is to be written: every so many steps, or about once a minute."""
    if recipe.save_every is not None:
        return bool(recipe.save_every) and step % recipe.save_every == 0
    return time.perf_counter() - last_saved > SECONDS_BETWEEN


def out_of_patience(recipe: Recipe, step: int, best_step: int) -> bool:
    """Whether the held-out loss has not fallen for `patience` evaluations."""
    return bool(
        recipe.patience and recipe.evaluate_every and step - best_step >= recipe.patience * recipe.evaluate_every
    )


def factor_at(step: int, steps: int, recipe: Recipe) -> float:
    """Share of the peak learning rate at a step: a linear rise over the warm-up, then the schedule down to 0."""
    rise = math.ceil(recipe.warmup * steps)
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, steps - rise)
    return {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}[recipe.schedule]


def refuse_divergence(
    job: Job, step: int, loss: float, norm: float, recent: Sequence[float], rows: Sequence[int]
) -> None:
    """Stop at a loss or gradient that is not a number, or when the losses of the last steps have exploded."""
    if math.isfinite(loss) and math.isfinite(norm):
        early, late = recent[: RECENT // 2], recent[-RECENT // 4 :]
        if len(recent) < RECENT or min(late) < 3 * max(early) + 3:
            return
        raise UserError(
            f"training diverged: loss {loss:.4g} at step {step + 1}, {max(early):.4g} before",
            fix="lower --learning-rate; `trimtab tune --find-lr` shows where it starts to diverge",
        )
    named = listing(row_name(job.train_rows, index) for index in culprits(job, rows) or rows)
    raise UserError(
        f"training diverged at step {step + 1}: loss {loss}, gradient norm {norm}; rows {named}",
        fix="lower --learning-rate; if it happens at once, look at these rows",
    )


def culprits(job: Job, rows: Sequence[int]) -> list[int]:
    """The rows of a step whose own loss is not a number."""
    with torch.no_grad():
        return [index for index in rows if not math.isfinite(loss_sum(job.model, job.batch([index]), job.task)[0])]
