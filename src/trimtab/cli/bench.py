"""`trimtab bench`: what adapters cost in use, measured on this machine."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trimtab.cli.verb import Verb, columns, heading, say, size
from trimtab.core.errors import UserError

if TYPE_CHECKING:
    from trimtab.core.method import Placed
    from trimtab.evaluate.timing import Timed

KINDS = ("latency", "switch", "mixed")


@click.command(cls=Verb, name="bench", short_help="Time adapters in use: latency, switching, mixed batches.")
@click.argument("kind", metavar="KIND", type=click.Choice(KINDS))
@click.option("--model", required=True, help="A directory, a starter or a hub id; a config.json gets random weights.")
@click.option("--methods", default="lora", show_default=True, help="With commas; switch and mixed take the first.")
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
    of its own with one adapter for all rows.
    """
    from trimtab.evaluate import timing

    batches, lengths = numbers("--batch", batch), numbers("--length", length)
    if out and not Path(out).resolve().parent.is_dir():
        raise UserError(f"bench: --out {out}: there is no such folder", fix=f"mkdir -p {Path(out).parent}")
    base = opened(model, dtype, device)
    asked = {name: parts_of(name, base) for name in names(methods)}
    document: dict[str, Any] = {"kind": kind, "model": model, "conditions": conditions(base, rounds, job)}
    first = next(iter(asked.values()))
    if kind == "latency":
        cells = timing.latency(
            base,
            asked,
            batches=batches,
            lengths=lengths,
            rounds=rounds,
            job=job,
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
        found = timing.switching(base, first, adapters=adapters, rounds=rounds)
        document |= {"method": next(iter(asked)), "adapters": adapters, "saved_bytes": found.saved_bytes}
        document["timed"] = [one.document() for one in found.timed]
        say(heading(f"{next(iter(asked))}: to another of {adapters} adapters ({size(found.saved_bytes)} each)"))
        say(columns([(one.name, milliseconds(one.seconds)) for one in found.timed], right=(1,)) + "\n")
    else:
        if len(batches) > 1 or len(lengths) > 1:
            batches, lengths = batches[-1:], lengths[:1]
            say(f"mixed takes one batch and one length: {batches[0]} rows of {lengths[0]} tokens", err=True)
        timed = timing.mixed(base, first, rows=batches[0], length=lengths[0], rounds=rounds, job=job)
        document |= {"method": next(iter(asked)), "rows": batches[0], "length": lengths[0]}
        document["timed"] = [one.document() for one in timed]
        document["throughput_beside_one_adapter"] = 1 / timed[1].ratio
        say(heading(f"{next(iter(asked))}: {batches[0]} rows of {lengths[0]} tokens, {job}"))
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
    """The model; from a `config.json` alone, or a folder with nothing else, with random weights of its shape."""
    from trimtab.models.loading import load, outline
    from trimtab.models.starters import quiet_transformers

    path = Path(source)
    with quiet_transformers():
        if path.name != "config.json":
            return load(source, dtype=dtype, device=device).model.eval()
        import torch

        from trimtab.models.loading import DTYPES

        shape: Any = outline(path.parent)
        torch.manual_seed(0)
        made = type(shape)(shape.config).eval()
        kind = DTYPES["float32" if dtype == "auto" else dtype]
        return made.to(kind) if device in ("auto", "cpu") else made.to(device, kind)


def parts_of(name: str, model: Any) -> list[Placed]:
    """A method or preset by name, with its own places."""
    from trimtab.train.recipe import build_method, recipe_from
    from trimtab.train.run import placed_parts

    recipe = recipe_from({"model": "-", "data": "-", "method": name})
    return placed_parts(build_method(recipe), recipe.where, [], model)


def conditions(model: Any, rounds: int, job: str) -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    from trimtab import __version__

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
        "interval": "of the median of ratios within a round, sign test, 95 %",
    }


def told(one: Timed) -> Sequence[str]:
    """A way as cells; the first of a table is 1.00 by construction."""
    change = f"{one.ratio - 1:+.1%}" if one.ratio != 1 or one.low != one.high else ""
    between = f"[{one.low - 1:+.1%}, {one.high - 1:+.1%}]" if change else ""
    return one.name, milliseconds(one.seconds), change, between


def milliseconds(seconds: float) -> str:
    """Seconds as a number of milliseconds."""
    return f"{1e3 * seconds:.3g} ms"
