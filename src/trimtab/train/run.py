"""Fine-tuning from a recipe to a run directory: one flat loop, to be read from top to bottom."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trimtab.core.attach import activate, attach, plan
from trimtab.core.delta import Delta, Part, require_state
from trimtab.core.errors import UserError, listing
from trimtab.core.fisher import MEASURES
from trimtab.core.format import Format
from trimtab.core.mapped import let_go_replaced
from trimtab.core.method import InputMethod, Method, Placed
from trimtab.core.registry import find, to_json
from trimtab.core.save import save
from trimtab.core.settle import settle
from trimtab.data.batches import batches, collate
from trimtab.data.cache import encode_cached
from trimtab.data.encoded import Encoded, EncodedSet
from trimtab.data.examples import Example
from trimtab.data.forms import detect, examples
from trimtab.data.labelled import labels_of
from trimtab.data.packing import SHARE, bag, pack
from trimtab.data.reading import read
from trimtab.data.shares import shares
from trimtab.data.splitting import held_amount, share_in_use, split, take
from trimtab.engine.attention import can_pack, edited_ends
from trimtab.engine.encoder import Seam, seam_of
from trimtab.engine.faster import PIECES, running
from trimtab.engine.heap import heap_kept
from trimtab.engine.loss import Batch, loss_sum, on, terms_of
from trimtab.engine.ranks import ALONE, Ranks, joined
from trimtab.engine.shifted_attention import can_shift, group_for
from trimtab.evaluate.loss import evaluate
from trimtab.models.loading import Loaded, fingerprint, writing_task
from trimtab.models.loading import load as load_model
from trimtab.models.starters import home
from trimtab.train import base, checkpoint, rundir
from trimtab.train.interrupt import Interrupt, Stopped
from trimtab.train.prompt_search import is_searched, search, wording
from trimtab.train.recipe import Recipe, build_method, with_preset
from trimtab.train.reporter import Reporter
from trimtab.train.trackers import names_in, opened
from trimtab.train.updates import Point, Ratios, Updates, ratios_of, refuse, rule_of, schedule_of
from trimtab.train.writer import Writer

if TYPE_CHECKING:
    from trimtab.models.slices import Slices

MEASURED_ROWS = 256
SECONDS_BETWEEN = 60.0
"""Seconds between checkpoints where the recipe does not say."""
PROBE_RATE = 2e-2
"""Learning rate where only a new head trains, on frozen features: at the rate of full fine-tuning it hardly moves."""
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


@dataclass
class Job:
    """Everything a run has decided before its first step."""

    recipe: Recipe
    directory: Path
    model: Any
    device: torch.device
    task: str
    train_rows: EncodedSet
    heldout_rows: EncodedSet
    pad_id: int
    packing: str
    group: int | None
    seam: Seam | None
    pieces: tuple[str, ...]
    rate: float
    ratios: Ratios
    steps: int
    steps_per_epoch: int
    record: dict[str, Any]
    tokenizer: Any = None
    ranks: Ranks = ALONE
    slices: Slices | None = None
    codes: Path | None = None
    """The file of a base whose codes were chosen by data."""

    @property
    def sharded(self) -> bool:
        """Whether the frozen weights are spread over the processes, which then all run as many passes."""
        return self.recipe.shard != "none"

    def passes(self, rows: Sequence[int]) -> list[tuple[Batch, int]]:
        """The batches that this process runs in a step over these rows, each with 1; with 0 one that does not count."""
        size, every = self.recipe.batch_size, [list(rows)]
        if self.ranks.size > 1:
            own = shares([self.train_rows[row] for row in rows], self.ranks.size, common=self.packing == "shared")
            every = [[rows[at] for at in one] for one in own]
        mine = every[self.ranks.rank]
        found = [(self.batch(mine[at : at + size]), 1) for at in range(0, len(mine), size)]
        if self.sharded:
            most = max(math.ceil(len(one) / size) for one in every)
            found += [(self.batch(rows[:1]), 0)] * (most - len(found))
        return found

    def batch(self, indices: Sequence[int]) -> Batch:
        """Some training rows as one batch, on the model's device."""
        return on(self.together([self.train_rows[index] for index in indices]), self.device)

    def together(self, rows: Sequence[Encoded]) -> Batch:
        """Rows as one sequence, or padded."""
        if self.packing == "off":
            return collate(rows, self.pad_id)
        if self.seam is not None:
            return bag(rows, self.seam.first_position)
        return pack(rows, SHARE if self.packing == "shared" else None, edited_ends(self.model) or ())

    @contextmanager
    def running(self) -> Iterator[None]:
        """What the model is trained and measured in."""
        packed, policy = self.packing != "off", self.recipe.checkpointing
        heap = heap_kept() if self.device.type == "cpu" and self.recipe.shard == "none" else nullcontext()
        parts = running(self.model, packed=packed, seam=self.seam, pieces=self.pieces, policy=policy, group=self.group)
        with heap, parts:
            yield

    def measure_again(self, part: Part, step: int) -> dict[str, torch.Tensor]:
        """The statistics of a part on some training rows, other ones after every step."""
        generator = torch.Generator().manual_seed(self.recipe.seed + step)
        chosen = torch.randperm(len(self.train_rows), generator=generator)[:MEASURED_ROWS].tolist()
        rows = [on(self.together([self.train_rows[index]]), self.device) for index in chosen]
        return statistics_of(self.model, part, rows, self.task)

    def measure(self) -> dict[str, Any]:
        """The held-out measures of the model as it is."""
        size = self.recipe.batch_size
        rows, ranks = self.heldout_rows, self.ranks
        return evaluate(self.model, rows, self.task, self.pad_id, batch_size=size, together=self.together, ranks=ranks)


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
            record["before"] = job.measure()
            activate(job.model, "default")
            let_go_replaced(job.model)
            ranks.told(lambda: started(job, record))
        tell.evaluated("before", record["before"])

        searched = any(is_searched(delta.method) for delta in job.model.modules() if isinstance(delta, Delta))
        metrics = search(job, tell) if searched else train(job, tell)

        tell.stage("measuring the tuned model")
        record["after"] = job.measure()
        tell.evaluated("after", record["after"])
    notes = {"tokenizer": job.train_rows.report.fingerprint, "base": record["model"]["fingerprint"]}
    notes |= {"dtype": record["model"]["dtype"]}
    prompt = wording(job.model, job.tokenizer)
    notes |= {"prompt": prompt} if prompt is not None else {}
    notes |= {"context": recipe.context} if recipe.context is not None else {}
    ranks.told(lambda: str(save(job.model, job.directory / rundir.ADAPTER, bake=recipe.bake, notes=notes)))
    heldout = [(0, record["before"]["loss"])]
    heldout += [(line["step"], line["heldout_loss"]) for line in metrics if "heldout_loss" in line]
    seconds, rows = metrics[-1]["seconds"], metrics[-1]["rows"]
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
    from trimtab.plan.of_run import predicted  # which plans with functions of this file

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
    started = last_saved = time.perf_counter()
    before = counters["seconds"]
    lines = job.directory / rundir.METRICS if ranks.first else os.devnull
    writing = Writer(job.directory, recipe.keep)
    with open(lines, "a", encoding="utf-8") as log, Interrupt() as interrupt, writing as writer:
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


def add_penalties(deltas: Sequence[Delta]) -> None:
    """Add the gradients of the terms that methods put on their own tensors."""
    for term in filter(None, (delta.method.penalty(delta) for delta in deltas)):
        term.backward()


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


def prepare(
    recipe: Recipe,
    tell: Reporter,
    directory: Path | None = None,
    *,
    loaded: Loaded | None = None,
    ranks: Ranks = ALONE,
) -> Job:
    """Read the data, load the model, attach the method: everything that can be refused is refused here.

    `loaded` is the recipe's model where it is in memory already, with nothing attached to it.
    """
    method = build_method(recipe)
    recipe = with_preset(recipe, method)
    rule, schedule, format = rule_of(recipe), schedule_of(recipe), base.format_of(recipe)
    names_in(recipe.track)
    directory = rundir.new_directory(recipe) if directory is None else directory
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)

    tell.stage("reading data")
    table = read(recipe.data)
    form = detect(table, recipe.columns or None)
    task = task_of(recipe, form.name, form.target)
    if task == "causal" and recipe.task == "auto":
        task = writing_task(recipe.model)
    train_examples, heldout_examples = parts_of(recipe, examples(table, form))
    tell.note(f"{form.name} data: {len(train_examples)} training rows, {len(heldout_examples)} held out")

    tell.stage("loading model")
    labels = label_names(train_examples) if task == "classify" else None
    slices = None
    if loaded is None and ranks.size > 1 and recipe.shard != "none" and task == "causal":
        loaded, slices = hollow_of(recipe, method, ranks) or (None, None)
        if slices is None:
            tell.note("every process loads the whole base first, and keeps its part: the start or the files need it")
    if loaded is None:
        loaded = load_model(
            recipe.model,
            task=task,
            labels=labels,
            dtype=recipe.dtype,
            device=recipe.device if recipe.shard == "none" else "cpu",
            head_seed=recipe.seed,
            context=recipe.context,
        )
    model = loaded.model
    base.require_dense(model, format)
    parts = [worded(part, loaded.tokenizer) for part in placed_parts(method, recipe.where, loaded.new_modules, model)]
    reserved = sum(part.method.virtual_tokens for part in parts if isinstance(part.method, InputMethod))
    train_rows, heldout_rows = encoded(recipe, loaded, train_examples, heldout_examples, reserved)
    for note in (*loaded.notes, *train_rows.report.notes):
        tell.note(note)

    steps_per_epoch = math.ceil(len(train_rows) / (recipe.batch_size * recipe.accumulation))
    steps = recipe.steps or max(1, math.ceil(recipe.epochs * steps_per_epoch))
    parts = [laid_out(part, steps, tell) for part in parts]
    if format is not None and format.needs_inputs and any(part.method.takes_out for part in parts):
        raise UserError(
            f"quantize: the method codes the weights itself, and {recipe.quantize} only whole ones, for their inputs",
            fix="quantize: affine, or start=None",
        )

    tell.stage("attaching")
    pad_id = loaded.tokenizer.pad_token_id
    together = format is not None and any(part.method.takes_out for part in parts)
    codes = None
    if format is not None and format.needs_inputs:
        codes = in_codes(recipe, loaded, format, train_rows, directory, tell, ranks)
    elif format is not None and not together:
        base.quantize_left(model, format)
    statistics = measured(model, parts, train_rows, task, pad_id, tell)
    masters = torch.float32 if loaded.dtype in (torch.bfloat16, torch.float16) else None
    quantize = format if together else None
    made_on = ranks.device if slices is not None else None
    attach(model, parts, seed=recipe.seed, dtype=masters, statistics=statistics, quantize=quantize, device=made_on)
    if format is not None and together:
        base.quantize_left(model, format)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    attached = require_state(model, "tune").adapters["default"].parts
    for part in attached:
        tell.note(f"{type(part.method).__name__} at {len(part.places)} sites ({part.where})")
    refuse(Point(recipe, rule, schedule, [part.method for part in attached], model, ranks.size))
    only_new = {place.module for part in attached for place in part.places} <= set(loaded.new_modules)
    own_rate = PROBE_RATE if only_new else parts[0].method.rate(width_of(model))
    natural = float(f"{own_rate * rule.relative_rate:.2g}")
    rate = recipe.learning_rate if recipe.learning_rate is not None else natural
    ratios = {} if recipe.equal_rates else ratios_of(attached, loaded.new_modules, width_of(model))
    others = [f"{rate * ratios[part.label]:g} at {part.where}" for part in attached if ratios.get(part.label, 1.0) != 1]
    shown = ", ".join([f"{rate:g}", *others])
    tell.note(f"{trainable:,} of {total:,} parameters train ({trainable / total:.2%}), learning rate {shown}")
    longest = max(len(row.ids) for part_rows in (train_rows, heldout_rows) for row in part_rows)
    labelled = task in ("classify", "regress") and recipe.packing != "off"
    seam = seam_of(model, train_rows, pad_id) if labelled else None
    group = group_of(recipe, model, task, longest)
    packing = packing_of(recipe, model, task, longest, seam)
    tell.note(f"packing: {packing}")
    if group is not None:
        tell.note(f"attention while training: in groups of {group} tokens, half of the heads shifted")

    record = {
        "status": "running",
        "task": task,
        "labels": labels,
        "versions": rundir.versions(),
        "model": {
            "source": recipe.model,
            "directory": str(loaded.directory),
            "fingerprint": fingerprint(loaded.directory or model),
            "class": loaded.model_class,
            "parameters": total - trainable,
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "context": loaded.max_length,
        },
        "data": {
            "path": recipe.data,
            "sha256": table.sha256,
            "form": form.name,
            "train_rows": len(train_rows),
            "heldout_rows": len(heldout_rows),
            "report": vars(train_rows.report) | {"notes": list(train_rows.report.notes)},
        },
        "method": [
            {"method": to_json(part.method), "where": part.where, "sites": len(part.places)} for part in attached
        ],
        "optimizer": to_json(rule),
        "active": to_json(schedule),
        "learning_rate": rate,
        "rate_ratios": ratios if others else {},
        "steps": steps,
        "packing": packing,
        "group": group,
        "trainable": trainable,
        "total": total,
    }
    if ranks.size > 1:
        record |= {"processes": ranks.size, "shard": recipe.shard}
    return Job(
        recipe=recipe,
        directory=directory,
        model=model,
        device=loaded.device if recipe.shard == "none" else ranks.device,
        task=task,
        train_rows=train_rows,
        heldout_rows=heldout_rows,
        pad_id=pad_id,
        packing=packing,
        group=group,
        seam=seam,
        pieces=pieces_of(recipe, ranks),
        rate=rate,
        ratios=ratios,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        record=record,
        tokenizer=loaded.tokenizer,
        ranks=ranks,
        slices=slices,
        codes=codes,
    )


def in_codes(
    recipe: Recipe, loaded: Loaded, format: Format, rows: EncodedSet, directory: Path, tell: Reporter, ranks: Ranks
) -> Path:
    """Code the base for some training rows, in the first process; the others read what it wrote."""
    task, pad_id = loaded.task, loaded.tokenizer.pad_token_id
    about = {"model": fingerprint(loaded.directory or loaded.model), "dtype": str(loaded.dtype)}
    about |= {"task": task, "context": str(recipe.context)}
    chosen = base.calibration_rows(rows, recipe.seed)

    def coded() -> Path:
        return base.encode(
            loaded.model,
            format,
            directory / base.BASE,
            home() / "codes",
            chosen,
            about,
            lambda model, batch: loss_sum(model, batch, task),
            lambda some: on(collate(some, pad_id), loaded.device),
            tell,
        )

    path = Path(ranks.told(lambda: str(coded())))
    return path if ranks.first else coded()


def hollow_of(recipe: Recipe, method: Any, ranks: Ranks) -> tuple[Loaded, Slices] | None:
    """The model of a recipe without its weights, and where they are; None where the method's start has to see them."""
    from trimtab.models.slices import Looks, hollow

    format = base.format_of(recipe)
    if format is not None and format.needs_inputs:
        return None
    found = hollow(recipe.model, dtype=recipe.dtype, device=ranks.device, context=recipe.context)
    if found is None:
        return None
    tried, _ = found
    try:  # on a model of its own, which costs no memory
        parts = [worded(part, tried.tokenizer) for part in placed_parts(method, recipe.where, (), tried.model)]
        if any(part.method.statistics or part.method.takes_out for part in parts):
            return None
        with Looks() as looks:
            attach(tried.model, parts, seed=recipe.seed, device=ranks.device)
    except (RuntimeError, NotImplementedError):
        return None
    return (
        hollow(recipe.model, dtype=recipe.dtype, device=ranks.device, context=recipe.context)
        if not looks.seen
        else None
    )


def task_of(recipe: Recipe, form: str, target: str | None) -> str:
    """The task a recipe and the form of its data ask for."""
    natural = "causal" if form != "labelled" else "regress" if target == "regression" else "classify"
    if recipe.task in ("auto", natural):
        return natural
    if recipe.task == "seq2seq" and natural == "causal":
        return "seq2seq"
    raise UserError(f"task: {recipe.task} was asked for, but {recipe.data} holds {form} rows, which make {natural}")


def parts_of(recipe: Recipe, found: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples: a file of its own, a share, or a number of rows; no prompt is in both."""
    asked = recipe.heldout
    if Path(asked).is_file():
        table = read(asked)
        heldout = examples(table, detect(table, recipe.columns or None))
        return take(list(found), recipe.limit, recipe.seed), heldout
    amount = share_in_use(held_amount(asked), len(found), recipe.limit, MEASURED_ROWS)
    train, heldout = split(list(found), amount, recipe.seed)
    return take(train, recipe.limit, recipe.seed), heldout


def label_names(rows: Sequence[Any]) -> list[str]:
    """The class names of labelled rows, as the encoder numbers them."""
    return [str(label) for label in labels_of(rows)]


def encoded(
    recipe: Recipe, loaded: Loaded, train: Sequence[Example], heldout: Sequence[Example], reserved: int = 0
) -> tuple[EncodedSet, EncodedSet]:
    """Both parts as token ids; held-out rows over the limit are cut at the right rather than refused.

    Of the positions a model has, those `reserved` for virtual tokens are left free.
    """
    limit = recipe.max_length or (loaded.max_length - reserved if loaded.max_length else None)
    settings: dict[str, Any] = {"max_length": limit, "train_on": recipe.train_on}
    if loaded.task == "seq2seq":
        settings["decoder_start"] = loaded.model.config.decoder_start_token_id
    kept = home() / "tokens"
    train_rows = encode_cached(train, loaded.tokenizer, settings | {"truncation": recipe.truncation}, kept)
    policy = recipe.truncation if recipe.truncation in ("error", "split") else "right"
    settings |= {"truncation": policy, "labels": train_rows.labels}
    return train_rows, encode_cached(heldout, loaded.tokenizer, settings, kept)


def placed_parts(method: Any, where: str | None, new_modules: Sequence[str], model: nn.Module) -> list[Placed]:
    """The parts to attach: the method's own, and a dense one for modules the pretrained model does not have.

    A new module that the method trains whole itself (`headonly`, `full` everywhere) gets no second copy.
    """
    listed = [method] if isinstance(method, Method | Placed) else list(method)
    parts = [item if isinstance(item, Placed) else Placed(item, None) for item in listed]
    if where is not None:
        if len(parts) > 1:
            raise UserError("where: a preset of several parts has its own places", fix="leave `where` out")
        parts = [Placed(parts[0].method, where)]
    full = find("full")
    whole = [part for part in parts if type(part.method) is full]
    covered = {place.module for part in plan(model, whole) for place in part.places} if whole else set()
    left = [module for module in new_modules if module not in covered]
    return [*parts, Placed(full(), ", ".join(left))] if left else parts


def worded(part: Placed, tokenizer: Any) -> Placed:
    """The same part; a method that starts as a text gets its token ids, which methods cannot know."""
    text = getattr(part.method, "text", "")
    if not text or part.method.tokens:  # type: ignore[attr-defined]
        return part
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return Placed(dataclasses.replace(part.method, tokens=ids), part.where)  # type: ignore[call-arg]


def laid_out(part: Placed, steps: int, tell: Reporter) -> Placed:
    """The same part; a method whose schedule would not end within the run gets one that does, and says so."""
    method = part.method.over(steps)
    if method == part.method:
        return part
    now, before = to_json(method), to_json(part.method)
    changed = listing(f"{key} {before[key]} -> {now[key]}" for key in now if now[key] != before[key])
    tell.note(f"{type(method).__name__} in a run of {steps} steps: {changed}")
    return Placed(method, part.where)


def measured(
    model: nn.Module, parts: Sequence[Placed], rows: EncodedSet, task: str, pad_id: int, tell: Reporter
) -> dict[str, torch.Tensor]:
    """The statistics that some methods want before they start."""
    found: dict[str, torch.Tensor] = {}
    for part in plan(model, [one for one in parts if one.method.statistics] or parts):
        wanted = part.method.statistics
        if wanted is None:
            continue
        tell.stage(f"measuring the {wanted} on {min(MEASURED_ROWS, len(rows))} rows")
        device = next(model.parameters()).device
        chosen = [collate([row], pad_id) for row in rows[:MEASURED_ROWS]]
        on_device = [{key: value.to(device) for key, value in batch.items()} for batch in chosen]
        found |= statistics_of(model, part, on_device, task)
    return found


def statistics_of(model: nn.Module, part: Part, rows: Sequence[Batch], task: str) -> dict[str, torch.Tensor]:
    """What a part's method wants measured, on batches of one row."""
    measure = MEASURES[part.method.statistics or ""]
    return measure(model, rows, part.where, loss=lambda m, batch: loss_sum(m, batch, task)[0])


def group_of(recipe: Recipe, model: nn.Module, task: str, longest: int) -> int | None:
    """Tokens in a group of shifted attention, None where attention is full."""
    if recipe.attention != "shifted":
        return None
    if task != "causal" or not can_shift(model, longest):
        raise UserError("attention: shifted is for causal models and methods that can be packed", fix="attention: full")
    if recipe.packing in ("shared", "off"):
        raise UserError(f"packing: {recipe.packing} leaves rows without groups of their own", fix="packing: plain")
    return recipe.group or group_for(longest)


def pieces_of(recipe: Recipe, ranks: Ranks) -> tuple[str, ...]:
    """The fast pieces of a run. Several processes share the pages of a mapped file, and keep sharing them."""
    if not recipe.faster or recipe.shard != "none":
        return ()
    return PIECES if ranks.size == 1 else tuple(one for one in PIECES if one != "aligned")


def packing_of(recipe: Recipe, model: nn.Module, task: str, longest: int, seam: Seam | None) -> str:
    """How rows are batched: `shared`, `plain` or `off`. Shared beginnings need a pass without dropout to be exact."""
    if recipe.packing == "off":
        return "off"
    if task != "causal" and recipe.packing == "shared":
        raise UserError(f"packing: {task} rows cannot share beginnings: every token sees all", fix="packing: auto")
    if task != "causal" and seam is not None:
        return "plain"
    if task != "causal" or not can_pack(model, longest):
        if recipe.packing == "auto":
            return "off"
        raise UserError(f"packing: {recipe.packing} is not exact for this model or method", fix="packing: off")
    rates = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    rates += [getattr(module.method, "dropout", 0.0) for module in model.modules() if isinstance(module, Delta)]
    rates.append(getattr(getattr(model, "config", None), "attention_dropout", 0.0) or 0.0)
    if recipe.packing == "plain" or (recipe.packing == "auto" and (any(rates) or recipe.attention == "shifted")):
        return "plain"
    if any(rates):
        raise UserError("packing: shared beginnings are not exact under dropout", fix="packing: plain, or dropout 0")
    return "shared"


def width_of(model: nn.Module) -> int:
    """Width of the residual stream."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "hidden_size", None) or getattr(text, "d_model", None) or 1024)


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
    named = listing(str(job.train_rows[index].row) for index in culprits(job, rows) or rows)
    raise UserError(
        f"training diverged at step {step + 1}: loss {loss}, gradient norm {norm}; rows {named}",
        fix="lower --learning-rate; if it happens at once, look at these rows",
    )


def culprits(job: Job, rows: Sequence[int]) -> list[int]:
    """The rows of a step whose own loss is not a number."""
    with torch.no_grad():
        return [index for index in rows if not math.isfinite(loss_sum(job.model, job.batch([index]), job.task)[0])]
