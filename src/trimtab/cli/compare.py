"""`trimtab compare`: a fair contest of methods on the user's own model, rows and machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trimtab.cli.verb import Verb, columns, duration, heading, is_machine, say, size
from trimtab.compare.watcher import Watcher
from trimtab.core.errors import UserError

if TYPE_CHECKING:
    from trimtab.compare.setup import Setup

METHODS = "lora,dora,ia3,prefix_tuning,bitfit,houlsby"


@click.command(cls=Verb, name="compare", short_help="Find the method for your model and data.")
@click.option("--model", required=True, help="A model directory, a starter model's name, or a hub id.")
@click.option("--data", required=True, help="Rows: jsonl, json, csv, tsv, parquet or txt, also gzipped.")
@click.option("--methods", default=METHODS, show_default=True, help="Contestants; settings as lora:rank=16+where=q.")
@click.option(
    "--ablate",
    type=click.Choice(["places", "ratios"]),
    help="Of each method: other places with as many values, or other ratios of B's rate to A's.",
)
@click.option("--minutes", type=float, help="Time for everything; fits the length of the runs to it.")
@click.option("--steps", type=int, help="Steps of a final run; default: one pass over the rows.")
@click.option("--seeds", type=int, default=3, show_default=True, help="Final runs of each method.")
@click.option("--rates", default="0.25,1,4", show_default=True, help="First learning rates, times a method's own.")
@click.option("--refine", default="0.5,1,2", show_default=True, help="Then these, times the best of the first.")
@click.option("--search", is_flag=True, help="Also try other ranks, lengths or widths where these matter.")
@click.option("--heldout", default="0.2", show_default=True, help="Rows that choose and judge: share, number or file.")
@click.option("--limit", type=int, help="Use at most this many training rows.")
@click.option("--columns", "roles", default="", help="Which column plays which role: prompt=mr,completion=ref.")
@click.option("--batch-size", type=int, default=8, show_default=True, help="Rows per step.")
@click.option("--max-length", type=int, help="Cut longer rows at so many tokens.")
@click.option(
    "--references", default="untuned,few-shot,head only,full", show_default=True, help="Also measured; '' none."
)
@click.option(
    "--reference-text",
    default="built-in",
    show_default=True,
    help="A text file on which forgetting is measured, or none.",
)
@click.option("--dtype", default="auto", show_default=True, help="Floating type of the frozen weights, for all alike.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or mps.")
@click.option("--threads", type=int, help="CPU threads.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the split and of the first runs.")
@click.option("--output", help="Directory to make, or to go on with; default: a numbered one under contests/.")
def command(
    model: str,
    data: str,
    methods: str,
    ablate: str | None,
    minutes: float | None,
    steps: int | None,
    seeds: int,
    rates: str,
    refine: str,
    search: bool,
    heldout: str,
    limit: int | None,
    roles: str,
    batch_size: int,
    max_length: int | None,
    references: str,
    reference_text: str,
    dtype: str,
    device: str,
    threads: int | None,
    seed: int,
    output: str | None,
) -> dict[str, Any]:
    """Hold a contest of methods on your model and rows, and recommend one.

    Every method gets the same rows, steps, seeds and learning-rate budget. Rates are chosen on some held-out rows, the
    verdict is on others, with intervals on the differences; where the data cannot tell, it says tie. Called again with
    the same --output it goes on behind the last finished run, and may name more methods.

    \b
        trimtab compare --model minilm-l6 --data rows.tsv --methods lora,ia3,bitfit,full --minutes 20
        trimtab compare --model minilm-l6 --data rows.tsv --methods lora:rank=8 --ablate places
    """
    from trimtab.compare.contest import compare
    from trimtab.compare.setup import Setup
    from trimtab.report.contest import write
    from trimtab.train.settings import pairs

    try:
        given = pairs(roles)
    except ValueError as error:
        raise UserError(f"compare: --columns: {error}", fix="--columns prompt=mr,completion=ref") from None
    names = tuple(one.strip() for one in methods.split(",") if one.strip())
    if ablate is not None:
        from trimtab.compare.ablation import ablated
        from trimtab.models.loading import outline

        names = ablated(ablate, ("lora",) if methods == METHODS else names, outline(model))
    setup = Setup(
        model=model,
        data=data,
        methods=names,
        columns=given,
        rates=numbers("rates", rates),
        refine=numbers("refine", refine),
        references=tuple(one.strip() for one in references.split(",") if one.strip()),
        heldout=heldout,
        limit=limit,
        seeds=seeds,
        steps=steps,
        minutes=minutes,
        batch_size=batch_size,
        search=search,
        reference_text=reference_text,
        max_length=max_length,
        dtype=dtype,
        device=device,
        threads=threads,
        seed=seed,
    )
    folder = Path(output) if output else numbered(setup)
    watcher = Screen()
    try:
        result = compare(setup, folder, watcher)
    finally:
        watcher.close()
    page = write(result, folder)
    say("\n" + table(result["table"], result["task"]))
    say("\n" + "\n".join(result["verdict"]["sentences"]))
    if result["skipped"]:
        say("\nnot run to the end\n" + columns([(name, reason) for name, reason in result["skipped"].items()]))
    say(f"\nreport  {page}")
    best = result["verdict"]["recommended"]
    if best is not None:
        say(
            f"next    trimtab chat {folder / result['runs'][best][0]['directory']}"
            if result["task"] == "causal"
            else ""
        )
    return result | {"report": str(page)}


def numbers(name: str, text: str) -> tuple[float, ...]:
    """Numbers with commas between them."""
    try:
        return tuple(float(one) for one in text.split(",") if one.strip())
    except ValueError:
        raise UserError(
            f"compare: --{name} {text!r} holds something that is no number", fix="--rates 0.3,1,3"
        ) from None


def numbered(setup: Setup) -> Path:
    """A directory under contests/ that is not there yet."""
    stem, number = Path(setup.model).name.lower(), 1
    while (Path("contests") / f"{stem}-{number}").exists():
        number += 1
    return Path("contests") / f"{stem}-{number}"


def table(rows: Sequence[Mapping[str, Any]], task: str) -> str:
    """The standings for people, best first."""
    word = "accuracy" if task == "classify" else "loss"
    forgot = any("forgetting" in row for row in rows)
    head = ("", word, *(["forgets"] if forgot else []), "rate", "trained", "time", "peak", "predicted", "file", "seeds")
    lines = [head]
    for row in rows:
        lines.append(
            (
                row["name"] + (" (reference)" if row["kind"] == "reference" else ""),
                f"{row[word]:.4f}",
                *([f"{row['forgetting']:+.3f}" if "forgetting" in row else ""] if forgot else []),
                f"{row['rate']:.2g}" if "rate" in row else "",
                f"{row['trainable']:,}" if "trainable" in row else "",
                duration(row["seconds"]) if "seconds" in row else "",
                size(row.get("peak_bytes")),
                off(row),
                size(row["saved_bytes"]) if "saved_bytes" in row else "",
                str(row["seeds"]),
            )
        )
    return heading("standings") + "\n" + columns(lines, right=tuple(range(1, len(head))))


def off(row: Mapping[str, Any]) -> str:
    """Predicted peak memory and by how much it misses the measured one."""
    if not row.get("predicted_bytes") or not row.get("peak_bytes"):
        return ""
    return f"{size(row['predicted_bytes'])} ({row['predicted_bytes'] / row['peak_bytes'] - 1:+.0%})"


class Screen(Watcher):
    """What the contest tells: a live table in a terminal, a line per run elsewhere, nothing with --json."""

    def __init__(self) -> None:
        self.began_at = time.perf_counter()
        self.quiet = is_machine()
        self.live: Any = None
        self.lines: list[str] = []
        self.standings: Sequence[Mapping[str, Any]] = ()
        if not self.quiet and sys.stdout.isatty():
            from rich.live import Live

            self.live = Live(refresh_per_second=4)
            self.live.start()

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def tell(self, text: str) -> None:
        """A line; the last few stay below the live table."""
        if self.quiet:
            return
        if self.live is None:
            click.echo(text)
            sys.stdout.flush()
            return
        self.lines = [*self.lines, text][-6:]
        self.draw()

    def draw(self) -> None:
        """The live table."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        drawn = Table(box=None, pad_edge=False)
        for title in ("method", "loss", "accuracy", "seeds"):
            drawn.add_column(title, justify="left" if title == "method" else "right")
        for row in self.standings:
            accuracy = f"{row['accuracy']:.4f}" if "accuracy" in row else ""
            drawn.add_row(row["name"], f"{row['loss']:.4f}", accuracy, str(row["seeds"]))
        clock = Text(duration(time.perf_counter() - self.began_at), style="dim")
        self.live.update(Group(drawn, *(Text(line) for line in self.lines), clock))

    def stage(self, text: str) -> None:
        self.tell(f"{text} ...")

    def note(self, text: str) -> None:
        self.tell(f"  {text}")

    def began(self, entry: Any, stage: str) -> None:
        if self.live is not None:
            self.tell(f"  {entry.name}, {stage} ...")

    def ran(self, entry: Any, stage: str, run: Mapping[str, Any], table: Sequence[Mapping[str, Any]]) -> None:
        self.standings = table or self.standings
        if "problem" in run:
            self.tell(f"  {entry.name}, {stage}: {run['problem']}")
            return
        told = [f"rate {run['rate']:.2g}"] if "rate" in run else []
        told += [f"choosing loss {run['choose']:.4f}"] if "choose" in run else []
        told += [f"loss {run['judge']['loss']:.4f}"] if "judge" in run else []
        told += [f"accuracy {run['judge']['accuracy']:.4f}"] if "accuracy" in run.get("judge", {}) else []
        told += [f"{name}={value}" for name, value in run.get("settings", {}).items()]
        self.tell(f"  {entry.name}, {stage}: {', '.join(told)} ({duration(run['total_seconds'])})")
