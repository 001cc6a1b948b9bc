"""One base model with many adapters: runs, adapters of ours and of other libraries, each checked against the base."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from trimtab.core.errors import UserError, listing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trimtab.core.format import Format
    from trimtab.models.loading import Loaded
    from trimtab.train.rundir import Run

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Wording:
    """How prompts for one model name are worded: as its adapter's training rows were."""

    adapter: str | None
    template: str
    """`chat` or `plain`."""
    separator: str = ""


@dataclass(frozen=True)
class Served:
    """A model with all its adapters attached and none of them active, and how each name words its prompts."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    names: Mapping[str, Wording]
    """Model name -> wording; the base comes first."""


@dataclass(frozen=True)
class Source:
    """An adapter on disk: its own directory, and the run it came from, if it did."""

    name: str
    directory: Path
    run: Run | None


def open_served(
    model: str,
    adapters: Mapping[str, Path],
    *,
    base_name: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    quantize: str | None = None,
) -> Served:
    """Load a base model once and every adapter onto it.

    `adapters` maps names to directories. `dtype` auto is that of the first run, else of `trimtab.models.loading.load`.
    Errors, before anything is served: a name twice, an adapter trained on another base or worded by another tokenizer
    or template, a run of another task, context or quantization.
    """
    from trimtab.core.attach import activate
    from trimtab.core.codes import load_codes
    from trimtab.interop.load import load as load_adapter
    from trimtab.models.fingerprints import fingerprint
    from trimtab.models.loading import load as load_model
    from trimtab.models.starters import quiet_transformers
    from trimtab.train.base import quantize_left, require_dense

    own = base_name or Path(model).name
    check_names([own, *adapters])
    sources = [source_of(name, directory) for name, directory in adapters.items()]
    runs = [one.run for one in sources if one.run is not None]
    context = one_context(sources)
    format, codes = one_format(quantize, sources)
    if dtype == "auto" and runs:
        dtype = runs[0].record["model"]["dtype"]
    loaded = load_model(model, dtype=dtype, device=device, context=context)
    require_dense(loaded.model, format)
    found = fingerprint(loaded.directory or loaded.model)
    has_template = bool(getattr(loaded.tokenizer, "chat_template", None))
    names = {own: Wording(None, "chat" if has_template else "plain")}
    problems = []
    for one in sources:
        try:
            names[one.name] = checked(one, found, loaded, format, "chat" if has_template else "plain")
        except UserError as error:
            problems.append(f"{one.name}: {error.message}")
    if problems:
        raise UserError(f"serve: {listing(problems, 5)}", fix="leave these out, or serve the model they belong to")
    with quiet_transformers():
        if codes is not None:
            load_codes(loaded.model, codes)
        elif format is not None:
            quantize_left(loaded.model, format)
        for one in sources:
            load_adapter(loaded.model, one.directory, one.name, trainable=False)
        if sources:
            activate(loaded.model, None)
    loaded.model.requires_grad_(False)
    return Served(loaded.model.eval(), loaded.tokenizer, names)


def check_names(names: Sequence[str]) -> None:
    """Names that requests can carry, each once."""
    odd = [repr(name) for name in names if not NAME.fullmatch(name)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if odd:
        raise UserError(f"serve: {listing(odd)} cannot be a model name", fix="letters, digits, '.', '-' and '_'")
    if twice:
        raise UserError(f"serve: {listing(twice)} names two models", fix="--adapter OTHERNAME=DIR")


def source_of(name: str, directory: Path) -> Source:
    """What lies in a directory: a run, an adapter inside one, or an adapter alone."""
    from trimtab.core.save import RECORD
    from trimtab.interop.load import is_foreign
    from trimtab.interop.opening import finished
    from trimtab.train.rundir import ADAPTER
    from trimtab.train.rundir import RECORD as RUN_RECORD

    if (directory / RUN_RECORD).is_file():
        return Source(name, directory / ADAPTER, finished(directory))
    if not (directory / RECORD).is_file() and not is_foreign(directory):
        raise UserError(f"serve: {directory} is neither a run nor an adapter", fix="give what `trimtab tune` wrote")
    inside = directory.name == ADAPTER and (directory.parent / RUN_RECORD).is_file()
    return Source(name, directory, finished(directory.parent) if inside else None)


def found_in(directory: Path) -> dict[str, Path]:
    """Every run and adapter in a directory, by the name of its folder."""
    from trimtab.core.save import RECORD
    from trimtab.interop.load import is_foreign
    from trimtab.train.rundir import RECORD as RUN_RECORD

    if not directory.is_dir():
        raise UserError(f"serve: {directory} is not a directory")
    inside = [one for one in sorted(directory.iterdir()) if one.is_dir()]
    found = {
        one.name: one for one in inside if (one / RUN_RECORD).is_file() or (one / RECORD).is_file() or is_foreign(one)
    }
    if not found:
        raise UserError(f"serve: there is no run and no adapter in {directory}", fix="--adapter NAME=DIR names one")
    return found


def notes_of(source: Source) -> dict[str, Any]:
    """What an adapter of ours says of its training beside its tensors."""
    from trimtab.core.save import RECORD, read_record

    return (read_record(source.directory).get("notes") or {}) if (source.directory / RECORD).is_file() else {}


def one_context(sources: Sequence[Source]) -> int | None:
    """The context all adapters were trained at."""
    wanted: dict[int | None, list[str]] = {}
    for one in sources:
        context = one.run.recipe.context if one.run is not None else notes_of(one).get("context")
        wanted.setdefault(context, []).append(one.name)
    if len(wanted) > 1:
        told = [f"{listing(names, 3)}: {context or 'the model its own'}" for context, names in wanted.items()]
        raise UserError(f"serve: adapters of different contexts cannot share a base ({'; '.join(told)})")
    return next(iter(wanted), None)


def one_format(quantize: str | None, sources: Sequence[Source]) -> tuple[Format | None, Path | None]:
    """The format the base is kept in, None for dense, and the file of its codes where inputs chose them.

    Unless `quantize` names one it is that of the runs, if they are all of one.
    """
    from trimtab.train.base import BASE, calibration, format_of
    from trimtab.train.settings import build_named

    runs = [one.run for one in sources if one.run is not None]
    formats = [format_of(run.recipe) for run in runs]
    if quantize is not None:
        format = build_named("storage", quantize, {})
    else:
        format = formats[0] if formats and all(one == formats[0] for one in formats) else None
    if format is None or not format.needs_inputs:
        return format, None
    folders = [run.directory for run, own in zip(runs, formats, strict=True) if own == format]
    if len({calibration(folder) for folder in folders}) != 1:
        raise UserError(
            f"serve: a base in {type(format).__name__} needs the codes of one run, and these have "
            f"{'different ones' if folders else 'none'}",
            fix="serve runs of one calibration" if folders else "give a run that was trained on it",
        )
    return format, folders[0] / BASE


def checked(source: Source, base: str, loaded: Loaded, format: Format | None, usual: str) -> Wording:
    """How an adapter words its prompts; an error where it does not belong to this base as it is served."""
    from trimtab.core.save import RECORD, read_record
    from trimtab.data.wording import require_same_words
    from trimtab.train.base import format_of

    notes, run = notes_of(source), source.run
    trained_on = run.record["model"]["fingerprint"] if run is not None else notes.get("base")
    if trained_on and trained_on != base:
        raise UserError(f"trained on another model (fingerprint {trained_on[:12]}, served {base[:12]})")
    if run is not None and run.record["task"] != "causal":
        raise UserError(f"a run of the task {run.record['task']}, which does not continue text")
    if (source.directory / RECORD).is_file():
        record = read_record(source.directory)
        if any("quantized" in part for part in record["parts"]):
            raise UserError("it encodes the base's weights without a part of them, so no other can share the base")
    if run is not None and (own := format_of(run.recipe)) != format:
        raise UserError(f"trained on {own or 'dense weights'}, served on {format or 'dense weights'}")
    report = ((run.record.get("data") or {}).get("report") or {}) if run is not None else {}
    words = report.get("fingerprint") or notes.get("tokenizer")
    if words:
        require_same_words(loaded.tokenizer, words, source.name)
    template = report.get("template", usual)
    return Wording(source.name, "chat" if template == "chat" else "plain", str(report.get("separator", "")))
