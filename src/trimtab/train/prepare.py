"""From a recipe to a job: rows, model, method; everything that can be refused is refused here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trimtab.core.attach import attach
from trimtab.core.delta import Delta
from trimtab.core.errors import UserError, listing
from trimtab.core.format import Format
from trimtab.core.method import InputMethod
from trimtab.core.registry import to_json
from trimtab.core.state import require_state
from trimtab.data.batches import collate
from trimtab.data.encoded import EncodedSet
from trimtab.data.mixture import Mixed, gather, rows_per_epoch, shares_in
from trimtab.engine.attention import can_pack
from trimtab.engine.encoder import Seam, seam_of
from trimtab.engine.faster import PIECES
from trimtab.engine.loss import loss_sum, on
from trimtab.engine.ranks import ALONE, Ranks
from trimtab.engine.shifted_attention import can_shift, group_for
from trimtab.models.fingerprints import fingerprint
from trimtab.models.loading import Loaded
from trimtab.models.loading import load as load_model
from trimtab.models.starters import home
from trimtab.models.tasks import writing_task
from trimtab.train import base, rundir
from trimtab.train.job import Job, width_of
from trimtab.train.placing import laid_out, measured, placed_parts, require_seen, worded
from trimtab.train.recipe import Recipe, build_method, with_preset
from trimtab.train.reporter import Reporter
from trimtab.train.rows import encoded_sources, label_names, parts_of, task_of_all
from trimtab.train.trackers import names_in
from trimtab.train.updates import Point, ratios_of, refuse, rule_of, schedule_of

if TYPE_CHECKING:
    from trimtab.models.slices import Slices

PROBE_RATE = 2e-2
"""Learning rate where only a new head trains, on frozen features: at the rate of full fine-tuning it hardly moves."""
LONG = 1024
"""Tokens of the longest row below which training in groups of a quarter of it is remarked on."""


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
    sources = gather(recipe.data, recipe.columns)
    task = task_of_all(recipe, sources)
    if task == "causal" and recipe.task == "auto":
        task = writing_task(recipe.model)
    training, measuring = parts_of(recipe, sources)
    forms = listing(dict.fromkeys(one.form.name for one in sources.parts))
    tell.note(f"{forms} data: {len(training.rows)} training rows, {len(measuring.rows)} held out")

    tell.stage("loading model")
    labels = label_names(training.rows) if task == "classify" else None
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
    train_rows, heldout_rows = encoded_sources(recipe, loaded, training, measuring, reserved)
    for line in shares_in(train_rows):
        tell.note(line)
    require_seen(parts, train_rows, model)
    for note in (*loaded.notes, *train_rows.report.notes):
        tell.note(note)

    steps_per_epoch = math.ceil(rows_per_epoch(train_rows) / (recipe.batch_size * recipe.accumulation))
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
        if longest < LONG:
            tell.note(f"the longest row has {longest} tokens: such short groups cost quality (--attention full)")

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
            "sha256": sources.sha256,
            "form": forms,
            "train_rows": len(train_rows),
            "heldout_rows": len(heldout_rows),
            "report": vars(train_rows.report) | {"notes": list(train_rows.report.notes)},
            **({"sources": shares_in(train_rows)} if isinstance(train_rows, Mixed) else {}),
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
    if recipe.compile != "off":
        return ("aligned",) if ranks.size == 1 else ()
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
