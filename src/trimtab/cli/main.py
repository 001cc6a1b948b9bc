"""The command `trimtab`: a group whose commands are imported when they are used, and what happens to every error."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import click

from trimtab import __version__
from trimtab.cli.verb import INTERRUPTED, USER_ERROR, emit, is_other_rank, last_words
from trimtab.core.errors import UserError, listing, nearest
from trimtab.engine.remembered import few_shapes_remembered

COMMANDS = {
    "quickstart": "Fetch a small model, tune it on shipped data, show the difference.",
    "tune": "Train an adapter from a model and a data file.",
    "compare": "Find the method for your model and data, with intervals.",
    "eval": "Measure a run or a model on a data file.",
    "plan": "Predict memory, operations and size before anything is loaded.",
    "analyze": "Show what runs changed in the weights: lengths, directions, rank.",
    "bench": "Time adapters in use: latency, switching, mixed batches.",
    "verify": "Check a recipe on its own model and rows, without training.",
    "chat": "Talk to a tuned model.",
    "serve": "Serve a model and its adapters over HTTP.",
    "inspect": "Show what is in a run or an adapter, without loading the model.",
    "merge": "Fold an adapter into its model and save a plain model.",
    "convert": "Turn an adapter into another format: PEFT, plain LoRA, GGUF.",
    "combine": "Make one adapter of several.",
    "migrate": "Turn a recipe of another program into one of ours.",
    "methods": "List the methods and presets, or describe one.",
    "models": "List the starter models and whether they are here.",
    "data": "Read a data file and show what would be trained.",
}
"""Command -> its line in `trimtab --help`; the command itself is `command` in `trimtab.cli.<name>`."""

DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
FULL_DISK = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


class Root(click.Group):
    """The group of all commands. Listing them imports none."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"trimtab.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            close = nearest(args[0], COMMANDS, 1)
            fix = f"did you mean `trimtab {close[0]}`?" if close else f"commands: {listing(COMMANDS, 20)}"
            raise UserError(f"no command {args[0]!r}", fix=fix)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        color: bool | None = None,
    ) -> Any:
        """Run a command line and exit: 0 done, 2 the user can mend it, 130 interrupted, 1 a fault of the program."""
        given = list(sys.argv[1:] if args is None else args) or ["--help"]
        machine = "--json" in (given[: given.index("--")] if "--" in given else given)
        color = False if os.environ.get("NO_COLOR") else color
        hush()
        try:
            code = super().main(
                given,
                prog_name=prog_name or "trimtab",
                complete_var=complete_var,
                standalone_mode=False,
                windows_expand_args=windows_expand_args,
                color=color,
            )
        except UserError as error:
            sys.exit(complain(error.message, error.fix, machine, lost=type(error).__name__ == "Lost"))
        except click.UsageError as error:
            where = f"{error.ctx.command_path} --help" if error.ctx is not None else "trimtab --help"
            sys.exit(complain(error.format_message(), where, machine))
        except click.ClickException as error:
            sys.exit(complain(error.format_message(), None, machine))
        except (click.Abort, KeyboardInterrupt) as stop:
            if is_other_rank():
                sys.exit(0)  # the first process says how it ended, and must not be torn down before
            told = str(stop) or str(stop.__cause__ or "") or "interrupted"  # click wraps what interrupts in an Abort
            if not last_words(told, None, INTERRUPTED):
                click.echo(told, err=True)
            sys.exit(INTERRUPTED)
        except OSError as error:
            if error.errno in DENIED and error.filename:
                fix = "check its permissions, or use another path"
                sys.exit(complain(f"{error.filename}: {error.strerror}", fix, machine))
            if error.errno not in FULL_DISK:
                sys.exit(confess())
            name = f" while writing {error.filename}" if error.filename else ""
            sys.exit(complain(f"the disk is full{name}", "free some space, or write to another disk", machine))
        except Exception as error:
            # one that is told elsewhere: torchrun ends the others at the first failure, before it is told perhaps
            sys.exit(0 if type(error).__name__ == "Elsewhere" else confess())
        sys.exit(code if isinstance(code, int) else 0)


def complain(message: str, fix: str | None, machine: bool, *, lost: bool = False) -> int:
    """Print an error that the user can mend, as text or as JSON; returns the exit code.

    Of several processes one tells an error: the one that has it, or the first where another is `lost`.
    """
    if last_words(message, fix, lost=lost) or (lost and is_other_rank()):
        return USER_ERROR
    if machine:
        emit({"error": message, "fix": fix})
    else:
        color = False if os.environ.get("NO_COLOR") else None
        click.echo(click.style("error: ", fg="red", bold=True) + message, err=True, color=color)
        if fix:
            click.echo(click.style("  fix: ", fg="green") + fix, err=True, color=color)
    return USER_ERROR


def confess() -> int:
    """Print the traceback of a fault of the program and ask for a report; returns the exit code."""
    traceback.print_exc()
    click.echo(
        f"\nThis is a fault in Trimtab {__version__}, not in your input. Please report it with the lines above.",
        err=True,
    )
    return 1


def hush() -> None:
    """Keep what libraries print of their own accord out of the output; a user's own settings win."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


@click.group("trimtab", cls=Root, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="trimtab", message="%(prog)s %(version)s")
def cli() -> None:
    """Fine-tune a large pretrained model by training a little of it.

    Start with `trimtab quickstart`, or with a data file of your own:

    \b
        trimtab data FILE
        trimtab tune --model smollm2-135m-instruct --data FILE --method lora

    Every command takes --help, and --json for machines.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv` (without the program's name; None: the process's own); returns the exit code."""
    few_shapes_remembered()  # which torch reads when it is loaded
    try:
        cli.main(argv)
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 0
    return 0
