"""The frozen base of a run in its format; what was chosen by data is kept in the run, which then needs no data."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trimtab.core.errors import UserError
from trimtab.core.format import Format
from trimtab.core.registry import to_json

if TYPE_CHECKING:
    from trimtab.data.encoded import EncodedSet
    from trimtab.train.recipe import Recipe
    from trimtab.train.reporter import Reporter

BASE = "base.safetensors"
ROWS, TOKENS = 128, 16384
"""Training rows that a base is calibrated on: at least so many, and more until they hold so many tokens."""
MOST_ROWS = 2048
ROWS_AT_ONCE = 8


def format_of(recipe: Recipe) -> Format | None:
    """The storage format of a recipe with its settings, None where the base stays dense."""
    from trimtab.train.settings import build_named

    if not recipe.quantize:
        return None
    made: Format = build_named("storage", recipe.quantize, recipe.quantize_settings)
    return made


def calibration(directory: Path) -> str:
    """What tells the codes kept in a run from those of another calibration. Error: the run has none."""
    from trimtab.core.files import sha256_of

    kept = directory / BASE
    if not kept.is_file():
        raise UserError(f"there is no file {kept}, which holds the codes this run was trained on")
    return sha256_of(kept)


def require_dense(model: nn.Module, format: Format | None) -> None:
    """Refuse a format for a base that came in codes of another one: they would have to be decoded and coded again."""
    from trimtab.core.quantized import quantized_modules

    codes: list[Any] = [module._modules["code"] for _, module in quantized_modules(model)]
    if format is not None and codes and not any(code.format == format for code in codes):
        raise UserError(
            f"quantize: this model's weights are in codes already ({codes[0].format}), which are kept as they are",
            fix="leave `quantize` out (for qlora: method lora), or give the model as it was before",
        )


def quantize_left(model: nn.Module, format: Format) -> None:
    """Quantize the frozen weights that are not quantized yet and carry no adapter."""
    from trimtab.core.quantized import quantize

    places = left(model)
    if places:
        quantize(model, format, select=lambda *_: places)


def left(model: nn.Module) -> list[Any]:
    """Places of linear weights that are not quantized yet and carry no adapter."""
    from trimtab.core.select import select

    return [
        place
        for place in select(model, "all-linear")
        if not {"code", "delta"} & set(model.get_submodule(place.module)._modules)
    ]


def calibration_rows(rows: EncodedSet, seed: int) -> list[Any]:
    """Training rows in an order of the seed: at least `ROWS`, and until they hold `TOKENS`; all, if there are fewer."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen: list[Any] = []
    tokens = 0
    for index in order[:MOST_ROWS]:
        if len(chosen) >= ROWS and tokens >= TOKENS:
            break
        chosen.append(rows[index])
        tokens += len(rows[index].ids)
    return chosen


def encode(
    model: nn.Module,
    format: Format,
    kept: Path,
    cache: Path,
    rows: Sequence[Any],
    about: dict[str, Any],
    call: Callable[[nn.Module, Any], object],
    together: Callable[[Sequence[Any]], Any],
    tell: Reporter,
) -> Path:
    """Code a base for rows, or take the codes of the run (`kept`) or of another with equal ones; returns their file.

    `about` is all else that codes depend on: the model's fingerprint, its dtype, the task.
    """
    from trimtab.core.calibrate import calibrate
    from trimtab.core.codes import load_codes, save_codes

    tokens = sum(len(row.ids) for row in rows)
    about = {**about, "format": to_json(format), "rows": len(rows), "tokens": tokens}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for row in rows:
        digest.update(json.dumps(list(row.ids)).encode())
    found = cache / f"{digest.hexdigest()[:32]}.safetensors"
    name = type(format).__name__
    for path in (kept, found):
        if path.is_file():
            try:
                load_codes(model, path)
            except UserError as error:
                if path == kept:
                    raise
                tell.note(f"{error.message}; it is made again")
                continue
            tell.note(f"base: {name} codes of {path.parent}, calibrated on {len(rows)} training rows")
            return path
    tell.stage(f"calibrating {name} on {len(rows)} training rows ({tokens:,} tokens)")
    batches = [together(rows[at : at + ROWS_AT_ONCE]) for at in range(0, len(rows), ROWS_AT_ONCE)]
    places = left(model)
    calibrate(model, format, batches, select=lambda *_: places, run=call)
    tell.note(f"base: {name} codes, calibrated on {len(rows)} training rows ({tokens:,} tokens)")
    return save_codes(model, found, about)


def keep(directory: Path, codes: Path) -> None:
    """The codes of a run as a file of its own: a link where the disk can, else a copy."""
    target = directory / BASE
    if codes == target:
        return
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{BASE}.{os.getpid()}.partial"
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(codes, temporary)
        except OSError:
            shutil.copyfile(codes, temporary)
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"output: could not write {target}: {error.strerror or error}", fix="free some space") from None
