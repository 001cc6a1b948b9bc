"""`trimtab analyze`: what a run changed in the weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trimtab.cli.verb import Verb, check_writable, columns, heading, say

if TYPE_CHECKING:
    from trimtab.interop.analysis import Analysis, Change


@click.command(cls=Verb, name="analyze", short_help="Show what runs changed in the weights: lengths, directions, rank.")
@click.argument("runs", metavar="RUN_OR_ADAPTER...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--model", help="The base model, for an adapter that lies alone.")
@click.option("--overlap/--no-overlap", default=True, help="Compare with the base's own directions: an SVD of each.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write plots and tables to this HTML file.")
@click.option("--device", default="cpu", show_default=True, help="Where the model is opened.")
def command(runs: tuple[Path, ...], model: str | None, overlap: bool, out: Path | None, device: str) -> dict[str, Any]:
    """Show what tuning changed in each weight of one or several runs.

    \b
        trimtab analyze runs/lora-1 runs/dora-1 runs/full-1 --out learned.html

    For every site: the change of length ΔM and of direction ΔD (DoRA's analysis), the spectrum of the update and its
    effective rank, how much it amplifies directions the base hardly uses (LoRA's analysis), and over sites the
    correlation of ΔM and ΔD. For methods that change weights; nothing is trained and nothing is written but `--out`.
    """
    from trimtab.interop.analysis import analyse, described
    from trimtab.interop.opening import opened
    from trimtab.models.starters import quiet_transformers

    if out is not None:
        check_writable("analyze", out)
    found: dict[str, Analysis] = {}
    for directory in runs:
        say(f"opening {directory}", err=True)
        with quiet_transformers():
            it = opened(directory, model, device, verb="analyze")
        name = directory.name if directory.name not in found else str(directory)
        found[name] = analyse(it.model, overlap=overlap)
        say(heading(name) + f"  {described(found[name])}")
        say(columns([HEAD, *by_role(found[name])], right=tuple(range(1, len(HEAD)))) + "\n")
    document: dict[str, Any] = {"runs": [{"name": name, **asdict(one)} for name, one in found.items()]}
    if out is not None:
        from trimtab.report.analysis import write

        document["page"] = str(write(found, out))
        say(f"Page: {out}")
    return document


HEAD = ("role", "sites", "ΔM", "ΔD", "‖ΔW‖/‖W‖", "rank", "effective rank", "amplification", "overlap")


def by_role(analysis: Analysis) -> list[tuple[str, ...]]:
    """Means over the sites of each role."""
    roles: dict[str, list[Change]] = {}
    for one in analysis.changes:
        roles.setdefault(one.role or "-", []).append(one)
    rows = []
    for role, listed in roles.items():
        keys = ("magnitude", "direction", "relative", "rank", "effective_rank", "amplification", "overlap")
        cells = [told([getattr(one, key) for one in listed]) for key in keys]
        rows.append((role, str(len(listed)), *cells))
    return rows


def told(values: list[float | None]) -> str:
    """The mean of what is known."""
    known = [one for one in values if one is not None]
    return f"{sum(known) / len(known):.3g}" if known else ""
