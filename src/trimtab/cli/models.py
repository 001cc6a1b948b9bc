"""`trimtab models`: the starter models, and whether they are on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from trimtab.cli.verb import Verb, columns, heading, say, size
from trimtab.core.errors import UserError, listing, nearest
from trimtab.models.starters import RECORD, Starter, fetch, home, starters


@click.command(cls=Verb, name="models", short_help="List the starter models.")
@click.argument("name", required=False)
@click.option("--fetch", "wanted", is_flag=True, help="Fetch the named model now.")
def command(name: str | None, wanted: bool) -> list[dict[str, Any]] | dict[str, Any]:
    """List the small models that need no model hub; with a NAME, describe one."""
    known = starters()
    if name is None:
        if wanted:
            raise UserError("models: --fetch needs the name of a model", fix=f"one of {listing(known)}")
        found = [document(one) for one in known.values()]
        say(heading("starters") + f", kept under {home() / 'models'}")
        rows = [
            (one["name"], "here" if one["cached"] else f"{size(one['download_bytes'])} to fetch", one["description"])
            for one in found
        ]
        say(columns(rows))
        say("\nAny directory with config.json and safetensors weights is a model too: trimtab tune --model DIRECTORY")
        return found
    if name not in known:
        close = nearest(name, known, 1)
        raise UserError(f"there is no starter {name!r}", fix=f"did you mean {close[0]}?" if close else listing(known))
    if wanted:
        fetch(name, progress=say)
    one = document(known[name])
    say(heading(one["name"]))
    keys = ("description", "licence", "packages", "note", "directory")
    say(columns([(key, listing(one[key]) if isinstance(one[key], list) else str(one[key])) for key in keys]))
    say("" if one["cached"] else f"\nnot here yet: trimtab models {name} --fetch ({size(one['download_bytes'])})")
    return one


def document(starter: Starter) -> dict[str, Any]:
    """A starter as plain data."""
    directory: Path = home() / "models" / starter.name
    return {
        "name": starter.name,
        "description": starter.description,
        "cached": (directory / RECORD).is_file(),
        "directory": str(directory),
        "download_bytes": starter.download_megabytes * 10**6,
        "licence": starter.licence,
        "packages": list(starter.packages),
        "note": starter.note,
    }
