"""`trimtab bench`: what adapters cost in use, measured on this machine."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trimtab.cli.verb import Verb, check_writable, columns, heading, say, size
from trimtab.core.errors import UserError

if TYPE_CHECKING:
    from trimtab.core.format import Format
    from trimtab.core.method import Placed
    from trimtab.evaluate.timing import Timed

KINDS = ("latency", "switch", "mixed")


@click.command(cls=Verb, name="bench", short_help="Time adapters in use: latency, switching, mixed batches.")
@click.argument("kind", metavar="KIND", type=click.Choice(KINDS))
@click.option("--model", required=True, help="A directory, a starter or a hub id; a config.json gets random weights.")
@click.option("--methods", default="lora", show_default=True, help="With commas; settings as houlsby:bottleneck=8.")
@click.option("--batch", default="1,4", show_default=True, help="Rows of a pass, with commas. mixed: one number.")
@click.option("--length", default="32,128", show_default=True, help="Tokens of a row, with commas. mixed: one number.")
@click.option("--job", type=click.Choice(("forward", "step")), default="forward", help="A pass, or the next token.")
@click.option("--rounds", type=click.IntRange(min=1), default=15, show_default=True, help="Turns of every way.")
@click.option("--adapters", type=click.IntRange(min=2), default=8, show_default=True, help="switch: loaded at once.")
@click.option("--dtype", default="auto", show_default=True, help="Floating type of the weights.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or mps.")
@click.option("--out", help="Also write the result, with its conditions, to this JSON file.")
def command(
    kind: str,
    model: str,
    methods: str,
    batch: str,
    length: str,
    job: str,
    rounds: int,
    adapters: int,
    dtype: str,
    device: str,
    out: str | None,
) -> dict[str, Any]:
    """Time adapters in use on this machine, ways in turns, with medians and intervals.

    \b
        trimtab bench latency --model smollm2-135m-instruct --methods lora,houlsby,pfeiffer,parallel,prefix_tuning
        trimtab bench latency --model gpt2-medium/config.json --methods houlsby,lin --batch 1 --length 128
        trimtab bench switch --model smollm2-135m-instruct --methods lora --adapters 16
        trimtab bench mixed --model smollm2-135m-instruct --methods lora --batch 16 --length 64

    `latency` compares methods with the plain model, which is also what a merged adapter costs. `switch` times going
    to another adapter that is loaded, and to one on disk. `mixed` compares a batch in which every row has an adapter
    of its own with one adapter for all rows. The last two take one method.
    """
    from trimtab.evaluate import timing

    batches, lengths = numbers("--batch", batch), numbers("--length", length)
    wanted = {name: recipe_of(name) for name in names(methods)}
    if kind != "latency" and len(wanted) > 1:
        raise UserError(f"bench {kind}: {len(wanted)} methods, and it takes one", fix=f"--methods {next(iter(wanted))}")
    if out:
        check_writable("bench", out)
    base = opened(model, dtype, device)
    asked = {name: parts_of(recipe, base) for name, recipe in wanted.items()}
    formats = {name: kept for name, recipe in wanted.items() if (kept := storage_of(recipe, base)) is not None}
    document: dict[str, Any] = {"kind": kind, "model": model, "conditions": conditions(base, rounds, job)}
    name, first = next(iter(asked.items()))
    if kind == "latency":
        cells = timing.latency(
            base,
            asked,
            batches=batches,
            lengths=lengths,
            rounds=rounds,
            job=job,
            formats=formats,
            tell=lambda text: say(f"timing {text}", err=True),
        )
        document["cells"] = [
            {"batch": one.batch, "length": one.length, "timed": [timed.document() for timed in one.timed]}
            for one in cells
        ]
        for one in cells:
            say(heading(f"{one.batch} row{'s' * (one.batch > 1)} of {one.length} tokens, {job}"))
            say(columns([told(timed) for timed in one.timed], right=(1, 2)) + "\n")
    elif kind == "switch":
        found = timing.switching(base, first, adapters=adapters, rounds=rounds, format=formats.get(name))
        document |= {"method": name, "adapters": adapters, "saved_bytes": found.saved_bytes}
        document["timed"] = [one.document() for one in found.timed]
        say(heading(f"{name}: to another of {adapters} adapters ({size(found.saved_bytes)} each)"))
        say(columns([(one.name, milliseconds(one.seconds)) for one in found.timed], right=(1,)) + "\n")
    else:
        if len(batches) > 1 or len(lengths) > 1:
            batches, lengths = batches[-1:], lengths[:1]
            say(f"mixed takes one batch and one length: {batches[0]} rows of {lengths[0]} tokens", err=True)
        timed = timing.mixed(
            base, first, rows=batches[0], length=lengths[0], rounds=rounds, job=job, format=formats.get(name)
        )
        document |= {"method": name, "rows": batches[0], "length": lengths[0]}
        document["timed"] = [one.document() for one in timed]
        document["throughput_beside_one_adapter"] = 1 / timed[1].ratio
        say(heading(f"{name}: {batches[0]} rows of {lengths[0]} tokens, {job}"))
        say(columns([told(one) for one in timed], right=(1, 2)))
        say(f"one adapter for each row: {1 / timed[1].ratio:.2f} times the rows a second of one for all\n")
    rest = document["conditions"]
    say(f"{rest['processor']}, {rest['threads']} threads, torch {rest['torch']}, {rest['dtype']}, {rounds} rounds")
    if out:
        Path(out).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document


def numbers(flag: str, text: str) -> list[int]:
    """`1,4` as whole numbers above zero."""
    try:
        found = [int(one) for one in text.split(",") if one.strip()]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise UserError(f"bench: {flag} {text!r} are no whole numbers above zero", fix=f"{flag} 1,4")
    return found


def names(text: str) -> list[str]:
    """The methods asked for."""
    found = list(dict.fromkeys(one.strip() for one in text.split(",") if one.strip()))
    if not found:
        raise UserError("bench: --methods names none", fix="--methods lora,houlsby")
    return found


def opened(source: str, dtype: str, device: str) -> Any:
    """The model, with a head of one number where it only reads; from a `config.json` with random weights."""
    from trimtab.models.loading import load, of_shape, outline
    from trimtab.models.starters import quiet_transformers

    with quiet_transformers():
        if Path(source).name == "config.json":
            return of_shape(source, dtype=dtype, device=device)
        shape: Any = outline(source)
        reads = "seq2seq" if shape.config.is_encoder_decoder else "regress"
        return load(source, task="causal" if is_causal(shape) else reads, dtype=dtype, device=device).model


def is_causal(model: Any) -> bool:
    """Whether a model writes behind what it reads."""
    return bool(model.can_generate()) and not model.config.is_encoder_decoder


def recipe_of(text: str) -> Any:
    """The recipe of a method or preset, `lora` or `lora:rank=16`."""
    from trimtab.compare.setup import contestant
    from trimtab.train.recipe import recipe_from

    return recipe_from({"model": "-", "data": "-", **contestant(text).recipe})


def parts_of(recipe: Any, model: Any) -> list[Placed]:
    """What a recipe attaches, and where."""
    from trimtab.train.placing import placed_parts
    from trimtab.train.recipe import build_method

    return placed_parts(build_method(recipe), recipe.where, [], model)


def storage_of(recipe: Any, model: Any) -> Format | None:
    """The format that a recipe keeps the frozen weights in."""
    from trimtab.train.base import format_of, require_dense

    format = format_of(recipe)
    require_dense(model, format)
    return format


def conditions(model: Any, rounds: int, job: str) -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    from trimtab import __version__
    from trimtab.evaluate.timing import FEWEST

    weight = next(model.parameters())
    return {
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "device": str(weight.device),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "parameters": sum(one.numel() for one in model.parameters()),
        "rounds": rounds,
        "job": job,
        "torch": torch.__version__,
        "trimtab": __version__,
        "interval": "of the median of ratios within a round, sign test, 95 %"
        if rounds >= FEWEST
        else f"none: smallest and largest ratio, since {rounds} rounds are fewer than {FEWEST}",
    }


def told(one: Timed) -> Sequence[str]:
    """A way as cells; the first of a table is 1.00 by construction."""
    change = f"{one.ratio - 1:+.1%}" if one.ratio != 1 or one.low != one.high else ""
    between = f"[{one.low - 1:+.1%}, {one.high - 1:+.1%}]" if change else ""
    return one.name, milliseconds(one.seconds), change, between


def milliseconds(seconds: float) -> str:
    """Seconds as a number of milliseconds."""
    return f"{1e3 * seconds:.3g} ms"
