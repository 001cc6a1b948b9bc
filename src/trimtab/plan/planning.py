"""The plan of a recipe: peak memory by category by two ways, operations, what is saved, and whether it fits."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimtab.core.errors import UserError
from trimtab.core.method import Placed
from trimtab.core.part import plan as plan_parts
from trimtab.engine.checkpointing import stacks_of
from trimtab.models.devices import DTYPES
from trimtab.models.loading import outline
from trimtab.plan.dry_run import Counted, batch_of, dry_run, prepared, rows_of
from trimtab.plan.formulas import Estimate, Shape, estimate, trains
from trimtab.plan.process import Room, around, passing, room
from trimtab.train.base import format_of
from trimtab.train.placing import placed_parts
from trimtab.train.recipe import Recipe, build_method, with_preset
from trimtab.train.updates import rule_of, schedule_of

DEEP = 28
"""Layers from which a stack is run at two smaller depths, and the rest follows, since layers are alike."""
DEPTHS = (6, 12)
UNREAD = 0.9
"""Share of an embedding's rows that a short run never reads: assumed; it is in no other memory of the process."""
WINDOW = 1 << 16
"""Bytes that Linux maps around a page of a file that is touched (its fault_around_bytes)."""
READING = 1e9
"""Bytes a second at which a saved adapter is read from disk and put in place: assumed, and stated as such."""


@dataclass(frozen=True)
class Plan:
    """What a recipe comes to. Bytes are of 10^0; `memory` holds them by category at the highest point of a step."""

    model: str
    recipe: dict[str, Any]
    memory: dict[str, int]
    """By category, with `process`, `allocator` and `file`: what the process holds beside the step's own tensors; and
    `loading`, what reading the weights in another floating type takes beyond that: the mapped file beside the copy."""
    peak_memory_bytes: int
    step_bytes: int
    """Living tensors of the step alone."""
    routes: dict[str, int | None]
    """The same by `formulas` and by `dry_run`; None where one of them does not know the model or the method."""
    apart: float | None
    """Difference of the two ways, as a share of the dry run."""
    flops_per_token: float
    flops_per_step: float
    parameters: int
    trained: int
    saved_bytes: int
    switch_seconds: float
    room: str
    room_bytes: int
    fits: bool
    notes: tuple[str, ...]
    seconds: float

    def document(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def plan(recipe: Recipe, *, fit: str | None = None, completions: float = 1.0) -> Plan:
    """Memory, operations, size and switching time of a recipe on a model known by its `config.json` alone.

    The recipe needs no data: rows are taken to be all `max_length` tokens long (default 512), and the last
    `completions` share of each is trained. `fit` is a size (24GB) or a device (rtx4090); default: this machine. Errors:
    `UserError`, as for `tune`.
    """
    return plan_of(recipe, fit=room(fit), completions=completions)


def plan_of(recipe: Recipe, *, fit: Room | None = None, completions: float = 1.0) -> Plan:
    """The plan of a recipe whose rows are all of its `max_length`."""
    started = time.perf_counter()
    fit = fit or room(None)
    recipe = with_preset(recipe, build_method(recipe))
    recipe = settled(recipe, fit)
    length = recipe.max_length or 512
    notes = [] if recipe.max_length else ["rows of 512 tokens, as no length is given"]
    notes += [] if recipe.compile == "off" else ["counted for blocks that are not compiled"]
    blank = read_outline(recipe)
    task = task_of(blank, recipe)
    dry = formula = None
    try:
        dry = counts(recipe, blank, task, length, completions, vocabulary_of(blank))
    except (UserError, RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        reason = error.message if isinstance(error, UserError) else f"{type(error).__name__}: {error}".splitlines()[0]
        notes.append(f"no dry run: {reason}")
    second = read_outline(recipe) if dry is not None else blank
    try:
        formula = by_formula(recipe, second, task, length, completions)
    except UserError as error:
        notes.append(error.message)
    if dry is None and formula is None:
        reasons = "; ".join(dict.fromkeys(notes))
        raise UserError(f"plan: neither way knows {recipe.method} on {recipe.model}: {reasons}")
    found = Found(recipe, second, length, dry, formula, tuple(notes))
    through, plain = passing(found.live), plain_of(recipe)
    if fit.kind == "cpu" and plain != recipe:
        through = passing_all(plain, task, length, completions)
    values = trained_of(recipe, read_outline(recipe), task) if dry is None else dry.trained
    return whole(found, fit, through, values, started)


@dataclass(frozen=True)
class Found:
    """What the two ways came to for a recipe on a model, with rows of a length."""

    recipe: Recipe
    model: nn.Module
    length: int
    dry: Counted | None
    formula: Estimate | None
    notes: tuple[str, ...]

    @property
    def live(self) -> dict[str, int]:
        """Bytes by category at the highest point of a step: by the dry run where there is one."""
        known = self.dry or self.formula
        assert known is not None
        return known.live


def plain_of(recipe: Recipe) -> Recipe:
    """The recipe of a step in which nothing is left out and nothing made again."""
    return replace(recipe, checkpointing="off", active=None)


def passing_all(plain: Recipe, task: str, length: int, completions: float) -> int:
    """Bytes that come and go in a step where nothing is left out or made again; 0 where neither way knows."""
    model = read_outline(plain)
    try:
        return passing(counts(plain, model, task, length, completions, vocabulary_of(model)).live)
    except (UserError, RuntimeError, NotImplementedError, TypeError, ValueError):
        with suppress(UserError):
            return passing(by_formula(plain, read_outline(plain), task, length, completions).live)
        return 0


def whole(found: Found, fit: Room, through: int, values: int, started: float) -> Plan:
    """A plan from what the two ways came to; `through` as in `beside`, `values` train."""
    recipe, live, formula, dry = found.recipe, found.live, found.formula, found.dry
    extra = beside(recipe, live, found.model, fit, DTYPES[recipe.dtype], through)
    memory = {**live, **{name: round(size) for name, size in extra.items()}}
    peak, saved = sum(memory.values()), 4 * values if dry is None else dry.adapter_bytes
    other = None if formula is None else formula.peak
    counted = None if dry is None else sum(dry.live.values())
    flops = float(dry.flops) if dry is not None else 0.0
    kept = ("method", "settings", "where", "quantize", "batch_size", "dtype", "optimizer", "active", "checkpointing")
    described = {key: value for key, value in vars(recipe).items() if key in kept} | {"max_length": found.length}
    return Plan(
        model=recipe.model,
        recipe={key: dict(value) if isinstance(value, Mapping) else value for key, value in described.items()},
        memory=memory,
        peak_memory_bytes=peak,
        step_bytes=sum(live.values()),
        routes={"formulas": other, "dry_run": counted},
        apart=None if counted is None or other is None else other / counted - 1,
        flops_per_token=flops / (recipe.batch_size * found.length),
        flops_per_step=flops,
        parameters=sum(p.numel() for p in found.model.parameters()),
        trained=values,
        saved_bytes=saved,
        switch_seconds=saved / READING,
        room=fit.name,
        room_bytes=round(fit.bytes),
        fits=peak - memory.get("loading", 0) <= fit.bytes,
        notes=found.notes,
        seconds=round(time.perf_counter() - started, 3),
    )


def settled(recipe: Recipe, fit: Room) -> Recipe:
    """`dtype: auto` as the device would have it."""
    if recipe.dtype != "auto":
        return recipe
    from trimtab.models.devices import auto_dtype

    found = torch.bfloat16 if fit.kind != "cpu" else auto_dtype(torch.device("cpu"))[0]
    return replace(recipe, dtype=str(found).removeprefix("torch."))


def read_outline(recipe: Recipe, task: str | None = None, outputs: int | None = None) -> Any:
    """The model on the meta device, from a directory, a `config.json`, a starter that is here, or a hub id.

    `task` is what it is to do, where the recipe leaves that to the data; `outputs` the number of classes.
    """
    source = Path(recipe.model)
    asked = task or (None if recipe.task == "auto" else recipe.task)
    return outline(source.parent if source.name == "config.json" else recipe.model, task=asked, outputs=outputs)


def task_of(model: Any, recipe: Recipe) -> str:
    """What a model would be trained to do."""
    if recipe.task != "auto":
        return recipe.task
    if getattr(model.config, "is_encoder_decoder", False):
        return "seq2seq"
    return "causal" if getattr(model, "get_output_embeddings", lambda: None)() is not None else "classify"


def new_modules_of(model: Any, task: str) -> list[str]:
    """Modules that a pretrained encoder does not have: its head."""
    if task not in ("classify", "regress"):
        return []
    prefix = getattr(model, "base_model_prefix", "")
    return [name for name, child in model.named_children() if name != prefix and any(True for _ in child.parameters())]


def vocabulary_of(model: Any) -> int:
    """Number of tokens."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return int(getattr(config, "vocab_size", 1000) or 1000)


def trained_of(recipe: Recipe, model: Any, task: str) -> int:
    """Trained values by the methods' own formulas."""
    parts = placed_parts(build_method(recipe), recipe.where, new_modules_of(model, task), model)
    return trains(model, parts, False).values


def by_formula(recipe: Recipe, model: Any, task: str, length: int, completions: float) -> Estimate:
    """The closed formulas' estimate."""
    shape = Shape.of(model.config)
    if task in ("causal", "seq2seq") and shape.kind == "bert":
        raise UserError("no formulas for an encoder that writes")
    parts: list[Placed] = placed_parts(build_method(recipe), recipe.where, new_modules_of(model, task), model)
    odd = sorted({type(part.method).__name__ for part in parts if part.method.space != "weight"})
    if odd or recipe.attention == "shifted" or recipe.checkpointing == "selective":
        what = ", ".join(odd) or recipe.attention if odd or recipe.attention == "shifted" else recipe.checkpointing
        raise UserError(f"no formulas for {what}", fix="the dry run counts it")
    format = format_of(recipe)
    schedule = schedule_of(recipe)
    active = 1.0
    if schedule is not None:
        on = schedule.on(0, shape.layers, recipe.seed)
        active = len([layer for layer in on if 0 <= layer < shape.layers]) / shape.layers
    value = DTYPES[recipe.dtype].itemsize
    trained = trains(model, parts, format is not None)
    terms = recipe.batch_size * max(1, min(length - 1, round(completions * length)))
    return estimate(
        model,
        shape,
        trained,
        rule_of(recipe),
        rows=recipe.batch_size,
        length=length,
        terms=terms,
        value=value,
        format=format,
        checkpointing=recipe.checkpointing,
        active=active,
    )


def counts(recipe: Recipe, model: Any, task: str, length: int, completions: float, vocabulary: int) -> Counted:
    """The dry run; of a deep stack at two depths, from which the rest follows."""

    def at(model: Any) -> Counted:
        bench = prepared(recipe, model, task, new_modules_of(model, task), length)
        rows = rows_of(recipe.batch_size, length, task, completions, vocabulary)
        return dry_run(bench, batch_of(bench, rows))

    depth = depth_of(model, recipe)
    if depth is None:
        return at(model)
    low, high = (at(cut(read_outline(recipe), layers)) for layers in DEPTHS)
    return extended(low, high, (depth - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0]))


def depth_of(model: Any, recipe: Recipe) -> int | None:
    """Layers of a single deep stack that may be run shorter; None where it has to be run whole."""
    stacks = stacks_of(model)
    named = "@" in (recipe.where or "") or recipe.active or recipe.checkpointing == "sqrt"
    if named or len(stacks) != 1 or len(stacks[0]) < DEEP or recipe.method.replace("_", "") == "toplayers":
        return None
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return len(stacks[0]) if getattr(config, "num_hidden_layers", None) == len(stacks[0]) else None


def cut(model: Any, layers: int) -> Any:
    """The model with its first layers only."""
    stack = stacks_of(model)[0]
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == len(stack) and module[0] is stack[0]:
            del module[layers:]
            break
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return model


def extended(low: Counted, high: Counted, times: float) -> Counted:
    """What a deeper stack comes to: each of the highest points of a step grows by the layer."""

    def grown(one: float, other: float) -> int:
        return round(one + times * (other - one))

    points = [
        {key: grown(here[key], there[key]) for key in here} for here, there in zip(low.points, high.points, strict=True)
    ]
    fields = ("kept", "flops", "trained", "adapter_bytes", "state_bytes")
    more = {name: grown(getattr(low, name), getattr(high, name)) for name in fields}
    return replace(high, points=tuple(points), **more)


def beside(
    recipe: Recipe,
    live: dict[str, int],
    model: Any,
    fit: Room,
    dtype: torch.dtype,
    through: int = 0,
    tokens: Collection[int] | None = None,
) -> dict[str, float]:
    """What the process holds beside the step's tensors.

    `through` is what passes in a step where nothing is left out or made again, `tokens` are the ids that the rows hold,
    where that is known.
    """
    value, stored = dtype.itemsize, stored_as(model).itemsize
    own = replaced_of(recipe, model)
    mapped = -float(value * sum(W.numel() for W in own) if value == stored else 0)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    table = model.get_input_embeddings()
    read = table is not None and not any(W is table.weight for W in own)
    if value == stored and read and (head is None or head.weight is not table.weight):
        mapped -= value * table.weight.numel() * unread(tokens, value * table.weight.shape[1], len(table.weight))
    again = recipe.checkpointing != "off"
    extra = around(live, fit.kind, vocabulary_of(model), mapped, bool(recipe.quantize), through, again)
    if fit.kind == "cpu" and value != stored and recipe.shard == "none":
        both = (value + stored) * sum(one.numel() for one in model.parameters())
        extra["loading"] = max(0.0, extra["process"] + both - sum(live.values()) - sum(extra.values()))
    return extra


def replaced_of(recipe: Recipe, model: Any) -> list[nn.Parameter]:
    """The weights that the recipe's method puts its own in place of, whose pages of the file are let go."""
    parts = plan_parts(model, placed_parts(build_method(recipe), recipe.where, (), model))
    places = [place for part in parts if part.method.replaces for place in part.places]
    found = [model.get_submodule(place.module)._parameters.get("weight") for place in places if place.rows is None]
    return [W for W in found if W is not None]


def unread(tokens: Collection[int] | None, row: int, rows: int) -> float:
    """The share of a mapped embedding that stays on disk: the system maps `WINDOW` bytes around a row that is read."""
    if tokens is None:
        return UNREAD
    windows = {at for token in tokens for at in (token * row // WINDOW, (token * row + row - 1) // WINDOW)}
    return max(0.0, 1 - len(windows) / (row * rows / WINDOW))


def stored_as(model: Any) -> torch.dtype:
    """The floating type of the weights' file, by its configuration."""
    found = getattr(model.config, "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.float32
