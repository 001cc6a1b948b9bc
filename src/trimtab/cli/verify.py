"""`trimtab verify`: is this recipe right, on this model and these rows? The flags are those of `trimtab tune`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from trimtab.cli.tune import FLAGS, Tune, merged
from trimtab.cli.verb import columns, say
from trimtab.train.recipe import recipe_from

MARKS = {True: ("ok", "green"), False: ("WRONG", "red"), None: ("-", "yellow")}


@click.command(cls=Tune, name="verify", short_help="Check a recipe.", options_metavar="[FLAGS]")
@click.argument("recipe", required=False, metavar="[RECIPE.yaml]")
@click.option("--rows", type=click.IntRange(2), default=7, show_default=True, help="Rows to check with.")
@click.pass_context
def command(ctx: click.Context, recipe: str | None, rows: int) -> dict[str, Any]:
    """Check a recipe on its own model and rows, without training.

    Packed, padded, accumulated and checkpointed gradients are compared with those of every row alone; the base must
    keep its bits, files and merges must lose nothing. Exit code 1 if anything is wrong.

    \b
        trimtab verify --model smollm2-135m-instruct --data rows.jsonl --method dora
    """
    from trimtab.cli.progress import reporter
    from trimtab.models.starters import quiet_transformers
    from trimtab.train.verify import verify

    shown = reporter()
    try:
        with quiet_transformers():
            found = verify(recipe_from(merged(recipe, ctx.meta[FLAGS])), rows, shown)
    finally:
        shown.close()
    lines: list[tuple[str, ...]] = [("", "check", "measured", "bound", "")]
    for one in found:
        word, color = MARKS[one.passed]
        numbers = [f"{value:.1e}" if value is not None else "" for value in (one.measured, one.bound)]
        lines.append((click.style(word, fg=color), one.name, *numbers, one.note))
    say("\n" + columns(lines, right=(2, 3)))
    wrong = [one.name for one in found if one.passed is False]
    say("\n" + (f"{len(wrong)} of {len(found)} checks failed" if wrong else "everything that applies holds"))
    return {"checks": [asdict(one) for one in found], "exit_code": int(bool(wrong))}
