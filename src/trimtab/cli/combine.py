"""`trimtab combine`: one adapter of several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from trimtab.cli.verb import Verb, counted, heading, say
from trimtab.core.errors import UserError

WAYS = ("sum", "cat", "ties", "dare", "dare_ties", "magnitude_prune", "svd")


@click.command(cls=Verb, name="combine", short_help="Make one adapter of several.")
@click.argument("directories", metavar="RUN_OR_ADAPTER...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory to make; it must not exist.")
@click.option("--how", default="sum", show_default=True, type=click.Choice(WAYS), help="How changes are put together.")
@click.option("--weights", help="A number for each adapter: 1,0.5. All 1 without it.")
@click.option("--density", default=0.5, show_default=True, help="Share of entries that ties, dare and pruning keep.")
@click.option("--rank", type=click.IntRange(1), help="Rank of the result, where the ranks together are too many.")
@click.option("--seed", default=0, show_default=True, help="What dare draws its entries from.")
@click.option("--model", help="The base model of all, where no run says it.")
def command(
    directories: tuple[Path, ...],
    out: Path,
    how: str,
    weights: str | None,
    density: float,
    rank: int | None,
    seed: int,
    model: str | None,
) -> dict[str, Any]:
    """Make one adapter of several that were trained on the same model.

    `sum` and `cat` of LoRAs are exact. The other ways work on the changes of weights and cut them at a rank; the error
    is told. One adapter with weight 1 comes back as it is, bit for bit.
    """
    from trimtab.core.attach import detach
    from trimtab.interop.combine import combined
    from trimtab.interop.opening import opened
    from trimtab.interop.saved import Saved, saved_of, write_saved
    from trimtab.models.starters import quiet_transformers

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"combine: {out} exists and is not an empty directory", fix="choose another --out")
    given = numbers(weights)
    adapters: list[Saved] = []
    sources: dict[str, Path] = {}
    bare: Any = None
    with quiet_transformers():
        for directory in directories:
            say(f"reading {directory} ...")
            it = opened(directory, model, "cpu", verb="combine")
            adapters.append(it.saved or saved_of(it.model, "default", verb="combine"))
            sources.setdefault(str(it.directory or it.source), directory)
            bare = it.model if bare is None else bare
    if len(sources) > 1:
        raise UserError(
            f"combine: the adapters are of different base models: {', '.join(sources)}",
            fix="only adapters of one model can be combined",
        )
    made, fits = combined(detach(bare), adapters, how, given, density=density, rank=rank, seed=seed)
    first = adapters[0].record.get("notes") or {}
    kept = {key: first[key] for key in ("base", "tokenizer", "context", "dtype") if key in first}
    made.record["notes"] = kept | (made.record.get("notes") or {})
    write_saved(made, out)
    worst = max(fits, key=lambda fit: fit.error, default=None)
    say(heading(f"wrote one adapter of {counted(len(adapters), 'adapter')} to {out}") + f", by {how}")
    if worst is not None and worst.error:
        say(f"  largest error of a weight's change: {worst.error:.2%}, at {worst.site}, cut at rank {worst.kept}")
    else:
        say("  exact")
    return {
        "directory": str(out),
        "how": how,
        "weights": list(given or [1.0] * len(adapters)),
        "adapters": [str(one) for one in directories],
        "largest_weight_error": worst.error if worst is not None else 0.0,
        "sites": [vars(fit) for fit in fits],
    }


def numbers(text: str | None) -> list[float] | None:
    """Weights out of `1,0.5`."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"combine: --weights {text!r} are no numbers", fix="like 1,0.5") from None
