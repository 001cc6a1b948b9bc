"""The rows of a run: what they are for, which are held out, and their tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from trimtab.core.errors import UserError
from trimtab.data.cache import encode_cached
from trimtab.data.encoded import EncodedSet
from trimtab.data.examples import Example, Labelled
from trimtab.data.labelled import labels_of
from trimtab.data.mixture import Source, Sources, apportioned, gather, is_mixture, joined
from trimtab.data.splitting import held_amount, share_in_use, split, take
from trimtab.models.loading import Loaded
from trimtab.models.starters import home
from trimtab.models.tasks import decoder_start
from trimtab.train.job import MEASURED_ROWS
from trimtab.train.recipe import Recipe


def task_of_all(recipe: Recipe, sources: Sources) -> str:
    """The one task that a recipe and all its data sets ask for."""
    asked = {one.name: task_of(recipe, one.form.name, one.form.target) for one in sources.parts}
    if len(set(asked.values())) > 1:
        told = "; ".join(f"{name} makes {task}" for name, task in asked.items())
        raise UserError(f"mixture: one model has one task, but {told}", fix="train on each kind on its own")
    return next(iter(asked.values()))


def task_of(recipe: Recipe, form: str, target: str | None) -> str:
    """The task a recipe and the form of its data ask for."""
    natural = "causal" if form != "labelled" else "regress" if target == "regression" else "classify"
    if recipe.task in ("auto", natural):
        return natural
    if recipe.task == "seq2seq" and natural == "causal":
        return "seq2seq"
    raise UserError(f"task: {recipe.task} was asked for, but {recipe.data} holds {form} rows, which make {natural}")


def parts_of(recipe: Recipe, found: Sources) -> tuple[Sources, Sources]:
    """Training and held-out examples: a file of its own, a share, or a number of rows; no prompt is in both.

    Numbers of rows are parted among several data sets by their weights; a share is one of each.
    """
    weights = found.weights([len(one.rows) for one in found.parts])
    limits: list[int | None] = [None] * len(weights)
    if recipe.limit is not None:
        limits = [max(1, one) for one in apportioned(recipe.limit, weights)] if recipe.limit > 0 else [recipe.limit]
    own = Path(recipe.heldout).is_file()
    amount = None if own else held_amount(recipe.heldout)
    whole = isinstance(amount, int) and amount > 0
    amounts = [max(1, one) for one in apportioned(int(amount or 0), weights)] if whole else [amount] * len(weights)
    train, heldout = list[list[Example]](), list[list[Example]]()
    for one, limit, some in zip(found.parts, limits, amounts, strict=False):
        rows, kept = list(one.rows), list[Example]()
        if some is not None:
            rows, kept = named(one, found, partial(held_out, rows, some, limit, recipe.seed))
        train.append(take(rows, limit, recipe.seed))
        heldout.append(kept)
    if own:
        return found.holding(train), gather(recipe.heldout, None if is_mixture(recipe.heldout) else recipe.columns)
    return found.holding(train), found.holding(heldout)


def held_out(
    rows: list[Example], amount: float | int, limit: int | None, seed: int
) -> tuple[list[Example], list[Example]]:
    """Rows of one data set to train on, and those held out of it."""
    return split(rows, share_in_use(amount, len(rows), limit, MEASURED_ROWS), seed)


def named(source: Source, sources: Sources, function: Callable[[], Any]) -> Any:
    """What a function returns; of several data sets, its errors say which one is at fault."""
    try:
        return function()
    except UserError as error:
        if len(sources.parts) == 1:
            raise
        raise UserError(f"{source.name}: {error.message}", fix=error.fix) from None


def label_names(rows: Sequence[Any]) -> list[str]:
    """The class names of labelled rows, as the encoder numbers them."""
    return [str(label) for label in labels_of(rows)]


def encoded_sources(
    recipe: Recipe, loaded: Loaded, train: Sources, heldout: Sources, reserved: int = 0
) -> tuple[EncodedSet, EncodedSet]:
    """Both parts of all data sets as token ids, as `encoded` makes them of one."""
    if len(train.parts) == len(heldout.parts) == 1:
        return encoded(recipe, loaded, train.parts[0].rows, heldout.parts[0].rows, reserved)
    labelled = [row for row in train.rows if isinstance(row, Labelled)]
    labels = labels_of(labelled) if labelled else None
    for_training, for_measuring = settings_of(recipe, loaded, reserved)

    def made(sources: Sources, settings: dict[str, Any]) -> EncodedSet:
        settings, kept = settings | {"labels": labels}, home() / "tokens"
        sets = [
            named(one, sources, partial(encode_cached, one.rows, loaded.tokenizer, settings, kept))
            for one in sources.parts
        ]
        return joined(sets, sources, labels)

    plain = Sources(tuple(replace(one, weight=None) for one in heldout.parts))  # each row is measured once
    return made(train, for_training), made(plain, for_measuring)


def encoded(
    recipe: Recipe, loaded: Loaded, train: Sequence[Example], heldout: Sequence[Example], reserved: int = 0
) -> tuple[EncodedSet, EncodedSet]:
    """Both parts as token ids; held-out rows over the limit are cut at the right rather than refused.

    Of the positions a model has, those `reserved` for virtual tokens are left free.
    """
    for_training, for_measuring = settings_of(recipe, loaded, reserved)
    kept = home() / "tokens"
    train_rows = encode_cached(train, loaded.tokenizer, for_training, kept)
    return train_rows, encode_cached(heldout, loaded.tokenizer, for_measuring | {"labels": train_rows.labels}, kept)


def settings_of(recipe: Recipe, loaded: Loaded, reserved: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """How rows to train on, and rows to measure on, become token ids."""
    if loaded.max_length and reserved and reserved + 2 > loaded.max_length:
        raise UserError(
            f"the method reserves {reserved} positions, and the model has {loaded.max_length}: none is left for a text",
            fix="--length, the number of virtual tokens",
        )
    limit = recipe.max_length or (loaded.max_length - reserved if loaded.max_length else None)
    settings: dict[str, Any] = {"max_length": limit, "train_on": recipe.train_on}
    if loaded.task == "seq2seq":
        settings["decoder_start"] = decoder_start(loaded.model.config)
    policy = recipe.truncation if recipe.truncation in ("error", "split") else "right"
    return settings | {"truncation": recipe.truncation}, settings | {"truncation": policy}
