"""`trimtab merge`: fold an adapter into its model and save a plain model, with a proof that it computes the same."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trimtab.cli.verb import Verb, columns, counted, heading, say, size
from trimtab.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from trimtab.core.format import Format
    from trimtab.interop.opening import Opened
    from trimtab.interop.proof import Difference

PROOF = "proof.json"
INTO = ("auto", "original", "dequantized")


@click.command(cls=Verb, name="merge", short_help="Fold an adapter into its model.")
@click.argument("directory", metavar="RUN_OR_ADAPTER", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory to make; it must not exist.")
@click.option("--model", help="The base model, for an adapter that lies in no run directory.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or mps.")
@click.option("--data", type=click.Path(path_type=Path), help="Rows to compare on, instead of those of the run.")
@click.option("--rows", default=4, show_default=True, type=click.IntRange(1), help="How many rows to compare on.")
@click.option(
    "--into",
    default="auto",
    show_default=True,
    type=click.Choice(INTO),
    help="Over a quantized base: the original weights, or what the codes decode to.",
)
@click.option("--no-proof", "unproven", is_flag=True, help="Merge shard by shard and compare nothing: least memory.")
def command(
    directory: Path,
    out: Path,
    model: str | None,
    device: str,
    data: Path | None,
    rows: int,
    into: str,
    unproven: bool,
) -> dict[str, Any]:
    """Fold an adapter into its model and save the result as a plain model directory, with the tokenizer.

    The result needs no Trimtab. It is loaded again and compared with the adapter on rows of real data before it takes
    its name; the figures stand in proof.json. A quantized base becomes dense: the weights its codes decode to, unless
    the original ones do clearly better on these rows. A checkpoint of several files is merged file by file.
    """
    from trimtab.models.starters import quiet_transformers

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"merge: {out} exists and is not an empty directory", fix="choose another --out")
    with quiet_transformers():
        if unproven:
            return streamed(directory, out, model)
        return proven(directory, out, model, device, data, rows, into)


def proven(
    directory: Path, out: Path, model: str | None, device: str, data: Path | None, count: int, into: str
) -> dict[str, Any]:
    """Merge with a proof."""
    from trimtab.core.deltas import edited_modules
    from trimtab.interop import proof
    from trimtab.interop.opening import opened
    from trimtab.models.loading import load as load_model

    say("loading the model and the adapter ...")
    it = opened(directory, model, device)
    tuned = it.model
    rows, compared = (
        proof.rows_of(data, it.tokenizer, tuned, count)
        if data is not None
        else proof.probes(it.run, tuned, it.tokenizer, count)
    )
    before = proof.log_probabilities(tuned, rows)
    sites = sum(1 for _ in edited_modules(tuned))
    dtype = str(next(p.dtype for p in tuned.parameters() if p.is_floating_point())).removeprefix("torch.")
    found: dict[str, Difference] = {"adapter": proof.difference(before, before, rows)}
    coded = is_quantized(tuned)
    format = format_of(tuned) if coded else None
    if into != "auto" and not coded:
        raise UserError(f"merge: --into {into} is about a quantized base, and this one is dense")
    plain, chosen = merged(it, before, rows, found, into)
    with made_at_once(out) as temporary:
        say("saving ...")
        how = write(plain, it, temporary, coded)
        kind = stored_dtype(temporary) or dtype
        place = str(next(tuned.parameters()).device)
        del plain, tuned
        it.model = None  # type: ignore[assignment]
        again = load_model(temporary, task=it.task, labels=it.labels, dtype=dtype, device=place)
        after = proof.log_probabilities(again.model, rows)
        found["reloaded"] = proof.difference(before, after, rows)
        tolerance = proof.TOLERANCE.get(kind, 5e-3)
        reference = found["merged"].largest if chosen == "original" else 0.0
        close = found["reloaded"].largest <= tolerance + reference
        document = {
            "compared_on": compared,
            "rows": len(rows),
            "dtype": kind,
            "base": chosen,
            "written": how,
            "tolerance": tolerance,
            "equal": close,
            "differences": {name: one.as_json() for name, one in found.items()},
        }
        if format is not None:
            document["quantized"] = str(format)
        (temporary / PROOF).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    stored = sum(one.stat().st_size for one in out.iterdir())
    say(heading(f"merged {counted(sites, 'site')} into {out}") + f", {size(stored)}, {kind}, {how}")
    gap = found["reloaded"].largest
    say(f"  adapter and merged model: log-probabilities differ by {gap:.2g} at most, on {compared}")
    say(columns(proof.table(found), right=(1, 2, 3, 4), indent=4))
    if coded:
        say(f"  the base was quantized ({format}); merged into its {chosen} weights{losses(found)}")
    if not close:
        say(f"  warning: rounding to {kind} does not explain so much; compare both on your data before you use it")
    return {
        "directory": str(out),
        "sites": sites,
        "bytes": stored,
        "largest_log_probability_difference": gap,
        "proof": str(out / PROOF),
        **document,
    }


def losses(found: dict[str, Difference]) -> str:
    """The evidence for the choice of weights, in words."""
    one, other = found.get("into the original"), found["into the dequantized"]
    if one is None or one.loss is None:
        return ""
    return f": loss {one.loss:.4f} with the original ones, {other.loss:.4f} with the dequantized"


def merged(
    it: Opened, before: list[Tensor], rows: list[list[int]], found: dict[str, Difference], into: str
) -> tuple[nn.Module, str]:
    """The merged model in memory, and which weights of the base it holds: as they were, original or dequantized."""
    from trimtab.core.merge import merge
    from trimtab.core.quantized import dequantize
    from trimtab.interop import proof

    if not is_quantized(it.model):
        merge(it.model, quantized="dense")
        found["merged"] = proof.difference(before, proof.log_probabilities(it.model, rows), rows)
        return it.model, "as it was"
    format, paths = format_of(it.model), coded_paths(it.model)
    original = None if starts_on_codes(it) or came_in_codes(it) else on_original(it)
    values = None
    if original is not None:
        values = proof.log_probabilities(original, rows)
        found["into the original"] = proof.difference(before, values, rows)
    elif into == "original" and came_in_codes(it):
        raise UserError("merge: this base came in codes, and its original weights are not here", fix="--into auto")
    elif into == "original":
        raise UserError("merge: the adapter was started on these codes, so the original weights do not fit it")
    merge(it.model, quantized="dense")
    dequantize(it.model)
    dense = proof.log_probabilities(it.model, rows)
    found["into the dequantized"] = proof.difference(before, dense, rows)
    found["requantized"] = proof.difference(before, requantized(it.model, paths, format, rows), rows)
    wins = values is not None and proof.better(dense, values, rows)
    chosen = into if into != "auto" else ("original" if wins else "dequantized")
    name = "into the original" if chosen == "original" else "into the dequantized"
    found["merged"] = found[name]
    return (original if chosen == "original" and original is not None else it.model), chosen


def on_original(it: Opened) -> nn.Module:
    """The original, dense model with the adapter folded in."""
    from trimtab.core.merge import merge
    from trimtab.core.save import attach_saved

    base = it.base(device=str(next(it.model.parameters()).device), dtype=dtype_of(it.model))
    assert it.saved is not None
    attach_saved(base, it.saved.record, it.saved.tensors, "the adapter", trainable=False)
    return merge(base.eval())


def dtype_of(model: nn.Module) -> str:
    return str(next(p.dtype for p in model.parameters() if p.is_floating_point()))


def starts_on_codes(it: Opened) -> bool:
    """Whether the adapter fits these codes only, or is not ours to attach once more."""
    return it.saved is None or any(part.encoded for part in it.saved.parts)


def came_in_codes(it: Opened) -> bool:
    """Whether the base's own files hold codes, so that there are no other weights to merge into."""
    from trimtab.models.loading import outline

    return is_quantized(outline(it.source))


def coded_paths(model: nn.Module) -> list[str]:
    """The modules whose weights are kept in codes."""
    return [path for path, module in model.named_modules() if "code" in module._modules]


def format_of(model: nn.Module) -> Format:
    """The format of the first quantized weight."""
    code: Any = model.get_submodule(coded_paths(model)[0])._modules["code"]
    made: Format = code.format
    return made


def requantized(model: nn.Module, paths: list[str], format: Format, rows: list[list[int]]) -> list[Tensor]:
    """What the merged weights compute once they are in codes again; the model is dense before and after."""
    from trimtab.core.quantized import dequantize_module, quantize_module
    from trimtab.interop.proof import log_probabilities

    modules: dict[str, Any] = {path: model.get_submodule(path) for path in paths}
    kept = {path: module.weight.detach().clone() for path, module in modules.items()}
    for module in modules.values():
        quantize_module(module, format)
    values = log_probabilities(model, rows)
    for path in paths:
        dequantize_module(modules[path])
        modules[path].weight.data.copy_(kept[path])
    return values


def write(model: nn.Module, it: Opened, temporary: Path, coded: bool) -> str:
    """Write the merged model: file by file where its checkpoint has several, else as it is in memory."""
    if it.saved is not None and not coded and it.directory is not None:
        how = by_shards(it, temporary)
        if how is not None:
            return how
    save(model, it.tokenizer, temporary)
    return "from memory"


def by_shards(it: Opened, temporary: Path) -> str | None:
    """Merge the files of a checkpoint of several; None where it has one, or its names are not the model's."""
    from trimtab.interop import shards
    from trimtab.models.context import lengthen
    from trimtab.models.loading import outline

    assert it.saved is not None
    assert it.directory is not None
    files = shards.files_of(it.directory)
    if len(files) < 2:
        return None
    plan: Any = outline(it.source)
    if shards.why_not(plan, it.saved, it.directory) is not None:
        return None
    shards.merge_shards(plan, it.saved, it.directory, temporary)
    if it.context is not None:
        lengthen(plan.config, it.context, it.source)
    plan.config.save_pretrained(temporary)
    if getattr(plan, "generation_config", None) is not None and plan.can_generate():
        plan.generation_config.save_pretrained(temporary)
    it.tokenizer.save_pretrained(temporary)
    return f"file by file ({len(files)} files)"


def streamed(directory: Path, out: Path, model: str | None) -> dict[str, Any]:
    """Merge without building the model: one tensor at a time."""
    from trimtab.core.save import RECORD, read_record
    from trimtab.interop import shards
    from trimtab.interop.saved import open_saved
    from trimtab.models.context import lengthen
    from trimtab.models.loading import outline
    from trimtab.models.sources import directory_of
    from trimtab.train.rundir import ADAPTER, open_run
    from trimtab.train.rundir import RECORD as RUN_RECORD

    folder = directory if (directory / RUN_RECORD).is_file() else directory.parent
    run = open_run(folder) if (folder / RUN_RECORD).is_file() else None
    adapter = directory if (directory / RECORD).is_file() else directory / ADAPTER
    saved = open_saved(adapter)
    source = model or (run.recipe.model if run is not None else None)
    if source is None:
        read_record(adapter)
        raise UserError(f"merge: {adapter} does not say where its base model is", fix="name it with --model")
    if run is not None and run.recipe.quantize:
        raise UserError("merge: --no-proof is for a dense base", fix="leave --no-proof out")
    plan: Any = outline(source)
    if is_quantized(plan):
        raise UserError(f"merge: --no-proof is for a dense base, and {source} is in codes", fix="leave --no-proof out")
    shards.refuse(plan, saved)
    base = directory_of(source)
    why = shards.why_not(plan, saved, base)
    if why is not None or base is None:
        raise UserError(f"merge: {source} cannot be merged file by file: {why}", fix="leave --no-proof out")
    context = run.recipe.context if run is not None else (saved.record.get("notes") or {}).get("context")
    if context is not None:
        lengthen(plan.config, context, source)
    with made_at_once(out) as temporary:
        changed = shards.merge_shards(plan, saved, base, temporary)
        plan.config.save_pretrained(temporary)
        for file in base.iterdir():
            if file.name.startswith(("tokenizer", "vocab", "merges", "special_tokens", "chat_template", "generation")):
                shutil.copyfile(file, temporary / file.name)
    stored = sum(one.stat().st_size for one in out.iterdir())
    say(heading(f"merged {counted(changed, 'tensor')} into {out}") + f", {size(stored)}, file by file, not compared")
    return {"directory": str(out), "tensors": changed, "bytes": stored, "equal": None, "written": "file by file"}


def stored_dtype(directory: Path) -> str | None:
    """The type of the widest tensors of a checkpoint that was written."""
    from trimtab.interop import shards

    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    kinds = {one["dtype"] for path in shards.files_of(directory) for one in shards.header_of(path)[0].values()}
    return next((names[kind] for kind in ("BF16", "F16", "F32") if kind in kinds), None)


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
