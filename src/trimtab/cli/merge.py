"""`trimtab merge`: fold an adapter into its model and save a plain model, proven equal by loading it again."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trimtab.cli.verb import Verb, counted, heading, say, size
from trimtab.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from trimtab.train.rundir import Run

PROBES, PROBE_TOKENS = 4, 128
"""Rows on which the adapter and the merged model are compared, and their longest length in tokens."""
TOLERANCE = {"float32": 5e-3, "float16": 0.1, "bfloat16": 0.5}
"""Largest difference of log-probabilities that rounding explains."""


@click.command(cls=Verb, name="merge", short_help="Fold an adapter into its model.")
@click.argument("directory", metavar="RUN_OR_ADAPTER", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory to make; it must not exist.")
@click.option("--model", help="The base model, for an adapter that lies in no run directory.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or mps.")
def command(directory: Path, out: Path, model: str | None, device: str) -> dict[str, Any]:
    """Fold an adapter into its model and save the result as a plain model directory, with the tokenizer.

    The result needs no Trimtab. It is loaded again and compared with the adapter before it takes its name. A quantized
    base becomes dense.
    """
    from trimtab.core.delta import edited_modules
    from trimtab.core.merge import merge
    from trimtab.core.quantized import dequantize
    from trimtab.models.loading import load as load_model
    from trimtab.models.starters import quiet_transformers

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"merge: {out} exists and is not an empty directory", fix="choose another --out")
    with quiet_transformers():
        say("loading the model and the adapter ...")
        run, tuned, tokenizer, task, labels = loaded(directory, model, device)
        rows, compared = probes(run, tuned, tokenizer)
        before = log_probabilities(tuned, rows)
        sites = sum(1 for _ in edited_modules(tuned))
        dtype = str(next(p.dtype for p in tuned.parameters() if p.is_floating_point())).removeprefix("torch.")
        merge(tuned, quantized="dense")
        if is_quantized(tuned):
            dequantize(tuned)
        with made_at_once(out) as temporary:
            say("saving ...")
            save(tuned, tokenizer, temporary)
            device = str(next(tuned.parameters()).device)
            del tuned
            again = load_model(temporary, task=task, labels=labels, dtype=dtype, device=device)
            difference = largest_difference(before, log_probabilities(again.model, rows))
    close = difference <= TOLERANCE.get(dtype, 5e-3)
    stored = sum(one.stat().st_size for one in out.iterdir())
    say(heading(f"merged {counted(sites, 'site')} into {out}") + f", {size(stored)}, {dtype}")
    say(f"  adapter and merged model: log-probabilities differ by {difference:.2g} at most, on {compared}")
    if not close:
        say(f"  warning: rounding to {dtype} does not explain so much; compare both on your data before you use it")
    return {
        "directory": str(out),
        "sites": sites,
        "dtype": dtype,
        "bytes": stored,
        "largest_log_probability_difference": difference,
        "compared_on": compared,
        "equal": close,
    }


def loaded(directory: Path, model: str | None, device: str) -> tuple[Run | None, Any, Any, str, list[str] | None]:
    """The model with its adapter: of a run, of an adapter inside a run, or of an adapter alone with its base named."""
    from trimtab.core.save import RECORD, load, read_record
    from trimtab.models.loading import fingerprint
    from trimtab.models.loading import load as load_model
    from trimtab.train.rundir import RECORD as RUN_RECORD

    if not directory.is_dir():
        raise UserError(f"merge: {directory} is not a directory", fix="give a run directory, or that of an adapter")
    folder = directory if (directory / RUN_RECORD).is_file() else directory.parent
    inside = folder == directory or (directory / RECORD).is_file()
    if model is None and inside and (folder / RUN_RECORD).is_file():
        from trimtab.cli.chat import opened

        run = opened(folder)
        tuned, tokenizer = run.load(device)
        return run, tuned, tokenizer, run.record["task"], run.record.get("labels")
    record = read_record(directory / "adapter" if folder == directory else directory)
    if model is None:
        raise UserError(
            f"merge: {directory} does not say where its base model is ({record['base']['class']})",
            fix="name it with --model, or give the run directory",
        )
    if str(record["base"]["class"]).endswith("ForSequenceClassification"):
        raise UserError(
            f"merge: {directory} is the adapter of a classifier", fix="give its run directory, which knows the labels"
        )
    base = load_model(model, device=device)
    known = (record.get("notes") or {}).get("base")
    if known and base.directory is not None and fingerprint(base.directory) != known:
        raise UserError(
            f"merge: {model} is not the model this adapter was trained on (trained on fingerprint {known[:12]})",
            fix="name the model it was trained on",
        )
    words = (record.get("notes") or {}).get("tokenizer")
    if words:
        from trimtab.data.encode import require_same_words

        require_same_words(base.tokenizer, words, model)
    load(base.model, directory / "adapter" if folder == directory else directory, trainable=False)
    return None, base.model.eval(), base.tokenizer, "causal", None


def probes(run: Run | None, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[list[list[int]], str]:
    """Token ids to compare on, and what they are: the first rows of the run's data, else random ids."""
    import random

    from trimtab.data.encode import encode_all
    from trimtab.data.forms import detect, examples
    from trimtab.data.reading import read
    from trimtab.evaluate.generate import room_of
    from trimtab.models.starters import sha256_of

    longest = min(PROBE_TOKENS, room_of(model) - 1)
    if run is not None and Path(run.recipe.data).is_file():
        known = (run.record.get("data") or {}).get("sha256")
        with suppress(UserError):  # rows that cannot be read or encoded alone are no obstacle to merging
            if sha256_of(Path(run.recipe.data)) == known:
                table = read(run.recipe.data)
                rows = examples(table, detect(table, run.recipe.columns or None))[:PROBES]
                made = encode_all(rows, tokenizer, max_length=None, train_on="all")
                return [row.ids[:longest] for row in made], f"{len(made)} rows of the run's data"
    draw = random.Random(0)
    words = min(len(tokenizer), model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    return [
        [draw.randrange(words) for _ in range(min(16, longest))] for _ in range(PROBES)
    ], f"{PROBES} rows of random ids"


def log_probabilities(model: nn.Module, rows: list[list[int]]) -> list[Tensor]:
    """log softmax of the model's outputs for each row alone, in fp32 on the CPU; a single output stays as it is."""
    import torch

    device = next(model.parameters()).device
    with torch.no_grad():
        outputs = [model(input_ids=torch.tensor([ids], device=device)).logits[0].float().cpu() for ids in rows]
    return [one if one.shape[-1] == 1 else torch.log_softmax(one, -1) for one in outputs]


def largest_difference(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest absolute difference between two lists of tensors."""
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def is_quantized(model: nn.Module) -> bool:
    """Whether any weight is kept in codes."""
    return any("code" in module._modules for module in model.modules())


@contextmanager
def made_at_once(target: Path) -> Iterator[Path]:
    """A directory beside `target` that takes its name only when all went well, and leaves nothing otherwise."""
    temporary = target.parent / f".{target.name}.{os.getpid()}.partial"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if target.is_dir():
            target.rmdir()
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save(model: nn.Module, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write model and tokenizer; a full disk is an `OSError` whoever finds it out."""
    from safetensors import SafetensorError

    try:
        model.save_pretrained(directory)  # type: ignore[operator]
        tokenizer.save_pretrained(directory)
        for file in directory.glob("*.safetensors"):  # written through a private temporary file
            file.chmod((directory / "config.json").stat().st_mode)
    except SafetensorError as error:
        if "space" in str(error).lower() or "os error 28" in str(error):
            raise OSError(errno.ENOSPC, "no space left", str(directory)) from None
        raise
