"""What every command shares: `--json`, one document on standard output, and the words for numbers."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import click

from trimtab.core.errors import UserError

USER_ERROR, INTERRUPTED = 2, 130
TOLD = "TRIMTAB_TOLD"
"""Names the directory where a started process leaves its last words for the one that started it."""


class Verb(click.Command):
    """A command that returns its result as plain data. With --json that is all it prints on standard output."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        machine = click.Option(["--json", "machine"], is_flag=True, help="Print one JSON document instead of text.")
        *own, help_option = super().get_params(ctx)
        return [*own, machine, help_option]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise

    def invoke(self, ctx: click.Context) -> Any:
        machine = ctx.params.pop("machine")
        ctx.obj = machine
        if not machine:
            return exit_code(super().invoke(ctx))
        out = sys.stdout
        with contextlib.redirect_stdout(sys.stderr):
            document = super().invoke(ctx)
        emit(document, out)
        return exit_code(document)


def exit_code(document: Any) -> int:
    """The exit code a command asks for in its document; 0 if it says nothing of it."""
    return int(document.get("exit_code", 0)) if isinstance(document, Mapping) else 0


def is_machine() -> bool:
    """Whether the running command was asked for --json, so that it should print nothing itself."""
    return bool(click.get_current_context().obj)


def say(text: str = "", *, err: bool = False) -> None:
    """A line for people: nothing with --json."""
    if not is_machine():
        click.echo(text, err=err)


def emit(document: Any, stream: TextIO | None = None) -> None:
    """One JSON document on standard output; numbers that JSON does not know are null."""
    click.echo(json.dumps(_finite(document), indent=2, ensure_ascii=False), file=stream)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_finite(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def heading(text: str) -> str:
    """The title of a part of the output."""
    return click.style(text, bold=True)


def columns(rows: Iterable[Sequence[str]], *, right: Sequence[int] = (), indent: int = 2) -> str:
    """Lines with aligned columns; those numbered in `right` are flush right, the last one runs free."""
    table = [[str(cell) for cell in row] for row in rows]
    if not table:
        return ""
    widths = [max(len(click.unstyle(row[i])) for row in table if i < len(row)) for i in range(max(map(len, table)))]
    lines = []
    for row in table:
        cells = []
        for place, cell in enumerate(row):
            blanks = " " * (widths[place] - len(click.unstyle(cell)))
            cells.append(blanks + cell if place in right else cell + ("" if place == len(row) - 1 else blanks))
        lines.append(" " * indent + "  ".join(cells).rstrip())
    return "\n".join(lines)


def size(count: float | None) -> str:
    """A number of bytes: `1.2 MB` (10^6)."""
    if count is None:
        return "unknown"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """A time: `4.2 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def figure(value: Any) -> str:
    """A measured number in four digits; anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def share(part: float, whole: float) -> str:
    """A percentage that does not round a little down to nothing."""
    return f"{100 * part / whole:.3g}%" if whole else "0%"


def counted(count: int, what: str) -> str:
    """`1 site`, `14 sites`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def is_other_rank() -> bool:
    """Whether this process is one of several and not the first: it prints nothing."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return several and "MASTER_ADDR" in os.environ and os.environ.get("RANK", "0") != "0"


def last_words(message: str, fix: str | None, code: int = USER_ERROR, *, lost: bool = False) -> bool:
    """Leave an error to the process that started this one, which tells it; whether there is one."""
    folder = os.environ.get(TOLD)
    if not folder or "RANK" not in os.environ:
        return False
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    words = {"message": message, "fix": fix, "code": code, "lost": lost, "time": time.time(), "attempt": attempt}
    path = Path(folder) / f"{attempt}-{os.environ['RANK']}.json"
    path.with_suffix(".partial").write_text(json.dumps(words), encoding="utf-8")
    path.with_suffix(".partial").replace(path)
    return True


def check_writable(verb: str, out: str | Path) -> None:
    """Refuse a file for the result that could not be written, before anything is computed."""
    path = Path(out)
    if not path.resolve().parent.is_dir():
        raise UserError(f"{verb}: --out {out}: there is no such folder", fix=f"mkdir -p {path.parent}")
    if path.is_dir():
        raise UserError(f"{verb}: --out {out} is a folder", fix=f"--out {path / 'result'}, or another name in it")
    if not os.access(path if path.exists() else path.resolve().parent, os.W_OK):
        raise UserError(f"{verb}: --out {out} may not be written", fix="check its permissions, or use another path")
