"""The rows of a run: what they are for, which are held out, and their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.core.errors import UserError
from trimtab.data.cache import encode_cached
from trimtab.data.encoded import EncodedSet
from trimtab.data.examples import Example
from trimtab.data.forms import detect, examples
from trimtab.data.labelled import labels_of
from trimtab.data.reading import read
from trimtab.data.splitting import held_amount, share_in_use, split, take
from trimtab.models.loading import Loaded
from trimtab.models.starters import home
from trimtab.models.tasks import decoder_start
from trimtab.train.job import MEASURED_ROWS
from trimtab.train.recipe import Recipe


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
    if loaded.max_length and reserved and reserved + 2 > loaded.max_length:
        raise UserError(
            f"the method reserves {reserved} positions, and the model has {loaded.max_length}: none is left for a text",
            fix="--length, the number of virtual tokens",
        )
    limit = recipe.max_length or (loaded.max_length - reserved if loaded.max_length else None)
    settings: dict[str, Any] = {"max_length": limit, "train_on": recipe.train_on}
    if loaded.task == "seq2seq":
        settings["decoder_start"] = decoder_start(loaded.model.config)
    kept = home() / "tokens"
    train_rows = encode_cached(train, loaded.tokenizer, settings | {"truncation": recipe.truncation}, kept)
    policy = recipe.truncation if recipe.truncation in ("error", "split") else "right"
    settings |= {"truncation": policy, "labels": train_rows.labels}
    return train_rows, encode_cached(heldout, loaded.tokenizer, settings, kept)
