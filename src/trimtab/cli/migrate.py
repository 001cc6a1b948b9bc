"""`trimtab migrate`: a recipe of another program as one of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from trimtab.cli.verb import Verb, columns, heading, is_machine, say
from trimtab.core.errors import UserError


@click.command(cls=Verb, name="migrate", short_help="Turn a recipe of another program into one of ours.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Recipe to write; without it, it is printed.")
def command(file: Path, out: Path | None) -> dict[str, Any]:
    """Read a recipe of axolotl, LLaMA-Factory or TRL, or a PEFT config, and say what has no counterpart.

    \b
        trimtab migrate axolotl.yaml --out recipe.yaml
        trimtab verify recipe.yaml
        trimtab tune recipe.yaml
    """
    import yaml

    from trimtab.interop.migrate import migrate

    if out is not None and out.exists():
        raise UserError(f"migrate: {out} exists", fix="choose another --out")
    made = migrate(file)
    text = yaml.safe_dump(made.recipe, sort_keys=False, allow_unicode=True)
    if out is not None:
        out.write_text(text, encoding="utf-8")
        say(heading(f"wrote {out}") + f", from a recipe of {made.program}")
    elif not is_machine():
        click.echo(text, nl=False)
    if made.lost:
        say(heading("no counterpart:"), err=out is None)
        say(columns([[key, str(value), why] for key, value, why in made.lost]), err=out is None)
    for note in made.notes:
        say(f"  note: {note}", err=out is None)
    return {
        "program": made.program,
        "recipe": made.recipe,
        "lost": [{"key": key, "value": value, "why": why} for key, value, why in made.lost],
        "notes": made.notes,
        "file": str(out) if out is not None else None,
    }
