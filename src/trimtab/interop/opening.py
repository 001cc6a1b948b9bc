"""Opening what a user names: a run, an adapter inside one, an adapter alone, or one of another library."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from trimtab.core.errors import UserError
from trimtab.core.save import RECORD, load, read_record
from trimtab.interop.load import is_foreign
from trimtab.interop.load import load as load_any
from trimtab.interop.saved import Saved, open_saved
from trimtab.train.rundir import ADAPTER, Run, open_run
from trimtab.train.rundir import RECORD as RUN_RECORD


@dataclass
class Opened:
    """A model with its adapter attached, and what is known of both."""

    model: nn.Module
    tokenizer: Any
    run: Run | None
    task: str
    labels: list[str] | None
    source: str
    """The base model's name or directory."""
    directory: Path | None
    """Where the base model's files are."""
    context: int | None
    saved: Saved | None
    """The adapter as it lies on disk, where it is one of ours."""

    def base(self, device: str = "cpu", dtype: str | None = None) -> nn.Module:
        """The base model once more, dense and without the adapter."""
        from trimtab.models.loading import load as load_model

        kind = dtype or str(next(p.dtype for p in self.model.parameters() if p.is_floating_point()))
        seed = self.run.recipe.seed if self.run is not None else 0
        return load_model(
            self.source,
            task=self.task,
            labels=self.labels,
            dtype=kind.removeprefix("torch."),
            device=device,
            head_seed=seed,
            context=self.context,
        ).model


def opened(directory: Path, model: str | None, device: str = "auto", *, verb: str = "merge") -> Opened:
    """The model of a run, of an adapter inside a run, or of an adapter alone with its base named; all checked."""
    if directory.is_file() and is_foreign(directory):
        return of_foreign(directory, model, device, verb)
    if not directory.is_dir():
        raise UserError(f"{verb}: {directory} is not a directory", fix="give a run directory, or that of an adapter")
    folder = directory if (directory / RUN_RECORD).is_file() else directory.parent
    inside = folder == directory or (directory / RECORD).is_file()
    if model is None and inside and (folder / RUN_RECORD).is_file():
        return of_run(finished(folder), device)
    adapter = directory / ADAPTER if folder == directory else directory
    if is_foreign(adapter) and not (adapter / RECORD).is_file():
        return of_foreign(adapter, model, device, verb)
    return of_adapter(adapter, model, device, verb)


def finished(folder: Path) -> Run:
    """A run with an adapter in it."""
    run = open_run(folder)
    if not (folder / ADAPTER / RECORD).is_file():
        raise UserError(
            f"{folder} has no adapter: the run is {run.record.get('status', 'unfinished')}",
            fix=f"trimtab tune --resume {folder}",
        )
    return run


def of_run(run: Run, device: str) -> Opened:
    from trimtab.models.sources import directory_of

    model, tokenizer = run.load(device)
    place = directory_of(run.recipe.model)
    return Opened(
        *(model, tokenizer, run, run.record["task"], run.record.get("labels"), run.recipe.model, place),
        run.recipe.context,
        open_saved(run.directory / ADAPTER),
    )


def of_adapter(adapter: Path, model: str | None, device: str, verb: str) -> Opened:
    """An adapter of ours that lies alone: its base has to be named, and has to be the one it was trained on."""
    from trimtab.models.fingerprints import fingerprint
    from trimtab.models.loading import load as load_model

    record = read_record(adapter)
    notes = record.get("notes") or {}
    model = model or notes.get("base_model")
    if model is None:
        raise UserError(
            f"{verb}: {adapter} does not say where its base model is ({record['base']['class']})",
            fix="name it with --model, or give the run directory",
        )
    if str(record["base"]["class"]).endswith("ForSequenceClassification"):
        raise UserError(
            f"{verb}: {adapter} is the adapter of a classifier", fix="give its run directory, which knows the labels"
        )
    dtype = notes.get("dtype") or stored_dtype(model)
    base = load_model(model, dtype=dtype, device=device, context=notes.get("context"))
    known = notes.get("base")
    if known and base.directory is not None and fingerprint(base.directory) != known:
        raise UserError(
            f"{verb}: {model} is not the model this adapter was trained on (trained on fingerprint {known[:12]})",
            fix="name the model it was trained on",
        )
    if notes.get("tokenizer"):
        from trimtab.data.wording import require_same_words

        require_same_words(base.tokenizer, notes["tokenizer"], model)
    load(base.model, adapter, trainable=False)
    context = notes.get("context")
    saved = open_saved(adapter)
    return Opened(base.model.eval(), base.tokenizer, None, "causal", None, model, base.directory, context, saved)


def base_named(adapter: Path) -> str | None:
    """The base model that an adapter of another library names, if it does."""
    from trimtab.interop.adapterhub import is_adapterhub
    from trimtab.interop.peft.files import is_peft, read_config

    if is_adapterhub(adapter):
        told = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        return told.get("model_name") or None
    return read_config(adapter).get("base_model_name_or_path") if is_peft(adapter) else None


def stored_dtype(source: str) -> str:
    """The type a base model is stored in, which a conversion keeps; `auto` where that is not known."""
    from trimtab.interop.shards import DTYPES, files_of, header_of
    from trimtab.models.files import is_coded
    from trimtab.models.sources import directory_of

    directory = directory_of(source)
    if directory is not None and is_coded(directory):  # floats in its files are scales
        return "auto"
    files = files_of(directory) if directory is not None else []
    kinds = {entry["dtype"] for path in files for entry in header_of(path)[0].values()}
    found = next((DTYPES[kind] for kind in ("F32", "BF16", "F16") if kind in kinds), None)
    return "auto" if found is None else str(found).removeprefix("torch.")


def of_foreign(adapter: Path, model: str | None, device: str, verb: str) -> Opened:
    """An adapter of another library: its file names its base, or the user does."""
    from trimtab.models.loading import load as load_model
    from trimtab.models.tasks import writing_task

    source = model or base_named(adapter)
    if not source:
        raise UserError(f"{verb}: {adapter} does not say where its base model is", fix="name it with --model")
    labels = labels_of(adapter)
    task = "classify" if labels else writing_task(source)
    base = load_model(source, task=task, labels=labels, dtype=stored_dtype(source), device=device)
    load_any(base.model, adapter, trainable=False)
    return Opened(base.model.eval(), base.tokenizer, None, base.task, labels, source, base.directory, None, None)


def labels_of(adapter: Path) -> list[str] | None:
    """Names for the labels of a PEFT classifier, as many as its saved head has rows; None of another adapter."""
    from trimtab.interop.adapterhub import is_adapterhub
    from trimtab.interop.peft.files import WEIGHTS, is_peft, read_config
    from trimtab.interop.shards import header_of

    if not is_peft(adapter) or is_adapterhub(adapter) or read_config(adapter).get("task_type") != "SEQ_CLS":
        return None
    if not (adapter / WEIGHTS).is_file():
        return None
    heads = ("classifier.weight", "score.weight", "classifier.out_proj.weight")
    found = [one["shape"][0] for key, one in header_of(adapter / WEIGHTS)[0].items() if key.endswith(heads)]
    return [f"LABEL_{index}" for index in range(found[-1])] if found and found[-1] > 1 else None
