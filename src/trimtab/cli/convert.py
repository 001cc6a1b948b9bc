"""`trimtab convert`: an adapter in another library's format, as a plain LoRA, or for llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trimtab.cli.verb import Verb, columns, counted, figure, heading, say
from trimtab.core.errors import UserError

if TYPE_CHECKING:
    from trimtab.interop.opening import Opened
    from trimtab.interop.saved import Saved

TARGETS = ("trimtab", "peft", "lora", "gguf", "gguf-model", "bitsandbytes")


@click.command(cls=Verb, name="convert", short_help="Turn an adapter into another format.")
@click.argument("directory", metavar="RUN_OR_ADAPTER", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="What to make; it must not exist.")
@click.option(
    "--to", type=click.Choice(TARGETS), help="The format; an adapter of ours goes to peft, any other to ours."
)
@click.option("--model", help="The base model, where the adapter does not say it.")
@click.option("--rank", type=click.IntRange(1), help="For lora: keep at most this rank.")
@click.option("--energy", type=float, help="For lora: keep this share of the squared singular values.")
@click.option("--device", default="cpu", show_default=True, help="auto, cpu, cuda or mps.")
def command(
    directory: Path,
    out: Path,
    to: str | None,
    model: str | None,
    rank: int | None,
    energy: float | None,
    device: str,
) -> dict[str, Any]:
    """Turn an adapter into another format, and say which programs can serve it.

    \b
        peft        a directory that Hugging Face PEFT, vLLM and others load
        lora        any change of weights as a plain LoRA of ours, with the error measured
        gguf        a LoRA file for llama.cpp and Ollama
        gguf-model  the merged model as a GGUF file
        bitsandbytes  the merged model in 4 bits (NF4, double quantization), for transformers with bitsandbytes
        trimtab     an adapter of ours, from one of PEFT, AdapterHub or kohya's scripts
    """
    from trimtab.interop.load import is_foreign
    from trimtab.interop.opening import opened
    from trimtab.models.starters import quiet_transformers

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"convert: {out} exists and is not an empty directory", fix="choose another --out")
    if to != "lora" and (rank is not None or energy is not None):
        raise UserError("convert: --rank and --energy are for --to lora")
    to = to or ("trimtab" if is_foreign(directory) else "peft")
    with quiet_transformers():
        say("loading the model and the adapter ...")
        it = opened(directory, model, device, verb="convert")
        if to == "lora":
            return as_lora(it, out, rank, energy)
        if to == "gguf-model":
            return as_gguf_model(it, out)
        if to == "bitsandbytes":
            return as_bitsandbytes(it, out)
        saved = it.saved or attached(it)
        named(saved, it)
        bare = without(it)
        if to == "trimtab":
            from trimtab.interop.saved import write_saved

            write_saved(saved, out)
            say(heading(f"wrote an adapter of ours to {out}") + f", {counted(len(saved.tensors), 'tensor')}")
            return {"directory": str(out), "format": to, **described(saved)}
        if to == "gguf":
            from trimtab.interop.gguf_lora import write_gguf_lora

            names = write_gguf_lora(bare, saved, out)
            say(heading(f"wrote {out}") + f", {counted(len(names), 'tensor')}")
            return {"file": str(out), "format": to, "tensors": names}
        return as_peft(it, bare, saved, out)


def attached(it: Opened) -> Saved:
    """The attached adapter as a saved one."""
    from trimtab.core.state import require_state
    from trimtab.interop.saved import saved_of

    return saved_of(it.model, next(iter(require_state(it.model, "convert").adapters)))


def named(saved: Saved, it: Opened) -> None:
    """Let an adapter that will lie alone say what it is of."""
    known = it.saved.record.get("notes") or {} if it.saved is not None else {}
    notes = {key: known[key] for key in ("base", "tokenizer", "context", "dtype") if key in known}
    saved.record["notes"] = {"base_model": it.source} | notes | (saved.record.get("notes") or {})


def without(it: Opened) -> Any:
    """The base model without the adapter."""
    from trimtab.core.attach import detach

    return detach(it.model)


def described(saved: Saved) -> dict[str, Any]:
    """The parts of an adapter, for machines."""
    from trimtab.core.registry import to_json

    parts = [{"method": to_json(part.method), "where": part.where, "sites": len(part.sites)} for part in saved.parts]
    return {"parts": parts, "tensors": len(saved.tensors)}


def as_peft(it: Opened, bare: Any, saved: Saved, out: Path) -> dict[str, Any]:
    """Write PEFT's format and say who can serve it."""
    from trimtab.interop.peft.writing import to_peft, write_peft
    from trimtab.interop.servable import verdicts

    base = str(it.directory) if it.directory is not None else it.source
    config, tensors = to_peft(bare, saved, base=base)
    found = verdicts(config, tensors)
    write_peft(bare, saved, out, base=base)
    say(heading(f"wrote a PEFT {config['peft_type']} to {out}") + f", {counted(len(tensors), 'tensor')}")
    lines = [
        [one.program, "yes" if one.accepts else "no", one.how if one.accepts else "; ".join(one.reasons)]
        for one in found
    ]
    say(columns(lines))
    return {
        "directory": str(out),
        "format": "peft",
        "peft_type": config["peft_type"],
        "tensors": len(tensors),
        "servable": [
            {"program": one.program, "accepts": one.accepts, "reasons": list(one.reasons), "how": one.how}
            for one in found
        ],
    }


def as_lora(it: Opened, out: Path, rank: int | None, energy: float | None) -> dict[str, Any]:
    """Write a plain LoRA of ours, and what it loses in weights and in log-probabilities."""
    from trimtab.core.save import attach_saved
    from trimtab.core.state import require_state
    from trimtab.interop import proof
    from trimtab.interop.saved import write_saved
    from trimtab.interop.to_lora import to_lora

    name = next(iter(require_state(it.model, "convert").adapters))
    rows, compared = proof.probes(it.run, it.model, it.tokenizer)
    before = proof.log_probabilities(it.model, rows)
    saved, fits = to_lora(it.model, name, rank=rank, energy=energy)
    named(saved, it)
    bare = without(it)
    attach_saved(bare, saved.record, saved.tensors, out, trainable=False)
    gap = proof.difference(before, proof.log_probabilities(bare.eval(), rows), rows)
    write_saved(saved, out)
    worst = max(fits, key=lambda fit: fit.error, default=None)
    kept = max((fit.kept for fit in fits), default=0)
    say(heading(f"wrote a LoRA of rank {kept} to {out}") + f", {counted(len(fits), 'site')}")
    if worst is not None and worst.error:
        say(f"  largest error of a weight's change: {worst.error:.2%}, at {worst.site} (rank {worst.rank})")
    else:
        say("  exact: the rank of every change is kept")
    say(f"  log-probabilities differ by {figure(gap.largest)} at most, {figure(gap.mean)} in the mean, on {compared}")
    say(f"  the likeliest token is the same at {gap.greedy_agreement:.2%} of positions")
    return {
        "directory": str(out),
        "format": "lora",
        "rank": kept,
        "largest_weight_error": worst.error if worst is not None else 0.0,
        "sites": [vars(fit) for fit in fits],
        "log_probabilities": gap.as_json(),
        "compared_on": compared,
        **described(saved),
    }


def as_gguf_model(it: Opened, out: Path) -> dict[str, Any]:
    """Write the merged model as one GGUF file."""
    from trimtab.core.merge import merge
    from trimtab.core.quantized import dequantize
    from trimtab.interop.gguf_model import write_gguf_model

    coded = any("code" in module._modules for module in it.model.modules())
    merge(it.model, quantized="dense")
    if coded:
        dequantize(it.model)
    count = write_gguf_model(it.model, it.tokenizer, out)
    say(heading(f"wrote {out}") + f", the merged model, {counted(count, 'tensor')}")
    return {"file": str(out), "format": "gguf-model", "tensors": count}


def as_bitsandbytes(it: Opened, out: Path) -> dict[str, Any]:
    """Write the merged model in bitsandbytes' 4-bit keys, and what rounding to 4 bits changes."""
    from trimtab.cli.merge import made_at_once
    from trimtab.core.merge import merge
    from trimtab.core.quantized import dequantize, quantize
    from trimtab.interop import proof
    from trimtab.interop.bnb_model import write_bnb_model
    from trimtab.storage.nf4 import NF4

    rows, compared = proof.probes(it.run, it.model, it.tokenizer)
    before = proof.log_probabilities(it.model, rows)
    coded = any("code" in module._modules for module in it.model.modules())
    merge(it.model, quantized="dense")
    if coded:
        dequantize(it.model)
    quantize(it.model, NF4(double=True))
    gap = proof.difference(before, proof.log_probabilities(it.model, rows), rows)
    with made_at_once(out) as temporary:
        count = write_bnb_model(it.model, it.tokenizer, temporary)
    say(heading(f"wrote {out}") + f", the merged model, {counted(count, 'layer')} in NF4")
    say(f"  log-probabilities differ by {figure(gap.largest)} at most, {figure(gap.mean)} in the mean, on {compared}")
    say(f"  the likeliest token is the same at {gap.greedy_agreement:.2%} of positions")
    say(f"  AutoModelForCausalLM.from_pretrained({str(out)!r}) loads it where bitsandbytes is installed")
    return {
        "directory": str(out),
        "format": "bitsandbytes",
        "layers": count,
        "log_probabilities": gap.as_json(),
        "compared_on": compared,
    }
