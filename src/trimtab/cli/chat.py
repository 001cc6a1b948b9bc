"""`trimtab chat`: talk to a tuned model, with the untuned one beside it on request."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Generator, Mapping
from contextlib import closing, suppress
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trimtab.cli.talk import Talk
from trimtab.cli.verb import Verb, columns, figure, is_machine, say
from trimtab.core.errors import UserError

if TYPE_CHECKING:
    from trimtab.train.rundir import Run

COMMANDS = {
    "/base": "the untuned model's answer to the last prompt",
    "/both": "show every answer beside the untuned model's, or no longer",
    "/adapter NAME": "go on with another run's adapter; without a name, list them",
    "/reset": "forget the talk",
    "/help": "this list",
    "/quit": "end",
}


@click.command(cls=Verb, name="chat", short_help="Talk to a tuned model.")
@click.argument("directories", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--prompt", help="Answer this and exit; without it, prompts come from the terminal or line by line.")
@click.option("--base", is_flag=True, help="Show the untuned model's answer too.")
@click.option("--side-by-side", "beside", is_flag=True, help="Show it in a column of its own, beside the tuned one's.")
@click.option("--system", help="A system prompt, for chat models.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Longest answer.")
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0: the likeliest answer."
)
@click.option("--seed", type=int, help="Seed of the draws at a temperature above 0.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or mps.")
def command(
    directories: tuple[Path, ...],
    prompt: str | None,
    base: bool,
    beside: bool,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    seed: int | None,
    device: str,
) -> list[dict[str, Any]] | dict[str, Any]:
    """Talk to the model of a run. Prompts are worded exactly as its training rows were.

    A chat model remembers the talk; a model without a chat template continues the text. A classifier prints its label
    with the probabilities; for a pair of texts, put a tab between them. Of several runs over one model the first
    answers, until `/adapter NAME` (the name of a run's directory) goes on with another.
    """
    from trimtab.models.starters import quiet_transformers

    runs = named(directories)
    first = next(iter(runs.values()))
    with quiet_transformers():
        model, tokenizer = first.load(device)
    talk = Talk(model, tokenizer, first.record, max_new_tokens, temperature, seed, system)
    talk.runs = {next(iter(runs)): ("default", first.record)}
    for name, run in list(runs.items())[1:]:
        talk.add(name, run, first)
    talk.use(next(iter(runs)))
    if talk.writes and system and not talk.chats:
        raise UserError("chat: this run was not tuned with a chat template, so there is no system prompt")
    if prompt is not None:
        return shown(talk, prompt, base, beside, label=False)
    if sys.stdin.isatty() and not is_machine():
        converse(talk, base, beside)
        return []
    # Lines of a file are questions of their own: none of them follows from the one before.
    answers = []
    for line in filter(None, (line.rstrip("\n") for line in sys.stdin)):
        talk.history.clear()
        answers.append(shown(talk, line, base, beside, label=False))
    return answers


def named(directories: tuple[Path, ...]) -> dict[str, Run]:
    """Every run by what is typed to switch to it: the name of its directory."""
    found: dict[str, Run] = {}
    for directory in directories:
        name = re.sub(r"[^A-Za-z0-9_-]", "-", directory.resolve().name)
        if name in found or (found and name == "default"):
            raise UserError(f"chat: two runs are called {name}", fix="rename one of the directories")
        found[name] = opened(directory)
    return found


def opened(directory: Path) -> Run:
    """A run that has an adapter."""
    from trimtab.train.rundir import ADAPTER, open_run

    run = open_run(directory)
    if not (run.directory / ADAPTER).is_dir():
        status = run.record.get("status", "unfinished") if isinstance(run.record, dict) else "damaged"
        raise UserError(f"chat: {directory} has no adapter: the run is {status}", fix="train it to the end")
    return run


def shown(talk: Talk, text: str, base: bool, beside: bool = False, *, label: bool = True) -> dict[str, Any]:
    """Answer one prompt on the terminal as it comes; returns it as plain data."""
    if not text.strip():
        raise UserError("chat: the prompt is empty")
    if not talk.writes:
        scores = talk.scores(text)
        say(scores_text(scores))
        return scores
    if beside:
        return in_columns(talk, text)
    found = {"prompt": text}
    if base:
        found["base"] = spoken(talk.untuned(text), "untuned")
    name = talk.name if len(talk.runs) > 1 else "tuned" if base else "model"
    found["answer"] = spoken(talk.answer(text), name if base or label else "")
    return found


def in_columns(talk: Talk, text: str) -> dict[str, Any]:
    """The untuned model's answer and the tuned one's side by side; both are there before they are shown."""
    base = "".join(talk.untuned(text))
    answer = "".join(talk.answer(text))
    width = max(20, (shutil.get_terminal_size().columns - 3) // 2)
    left, right = (wrapped(one, width) for one in (base, answer))
    say(
        click.style("untuned".ljust(width), fg="cyan", bold=True) + " │ " + click.style(talk.name, fg="cyan", bold=True)
    )
    for one, other in zip_longest(left, right, fillvalue=""):
        say(f"{one:<{width}} │ {other}".rstrip())
    return {"prompt": text, "base": base, "answer": answer}


def wrapped(text: str, width: int) -> list[str]:
    """Lines of a text that are not longer than `width`; its own line ends stay."""
    return [part for line in text.split("\n") for part in textwrap.wrap(line, width) or [""]]


def spoken(pieces: Generator[str, None, None], name: str) -> str:
    """Print pieces of text as they come; returns them joined."""
    machine = is_machine()
    if name and not machine:
        click.echo(click.style(f"{name}> ", fg="cyan", bold=True), nl=False)
    said = []
    with closing(pieces):
        for piece in pieces:
            said.append(piece)
            if not machine:
                click.echo(piece, nl=False)
    say()
    return "".join(said)


def scores_text(scores: Mapping[str, Any]) -> str:
    """A label with the probabilities of all, or a number."""
    if "value" in scores:
        return figure(scores["value"])
    best = sorted(scores["probabilities"].items(), key=lambda item: -item[1])
    return f"{scores['label']}\n" + columns([(f"{100 * value:.1f}%", label) for label, value in best], right=(0,))


def converse(talk: Talk, base: bool, beside: bool = False) -> None:
    """Prompts from the terminal, until /quit or the end of input."""
    say(helped(talk))
    with suppress(ImportError):
        import readline  # noqa: F401 - gives `input` its line editing
    last = ""
    while True:
        try:
            text = input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            say()
            return
        word, _, rest = text.partition(" ")
        if text in ("/quit", "/exit", "/q"):
            return
        if text == "/reset":
            talk.history.clear()
            say("forgotten")
        elif text == "/base":
            untuned_last(talk, last)
        elif text in ("/both", "/side-by-side") and talk.writes:
            beside = not beside
            say("answers are shown beside the untuned model's" if beside else "answers are shown alone")
        elif word == "/adapter":
            switched(talk, rest.strip())
        elif text.startswith("/"):
            say(helped(talk))
        elif text:
            last = text
            interruptible(talk, text, base, beside)


def helped(talk: Talk) -> str:
    """What can be typed beside prompts."""
    if not talk.writes:
        return "one text per line; /quit ends"
    left_out = () if len(talk.runs) > 1 else ("/adapter NAME",)
    return columns([item for item in COMMANDS.items() if item[0] not in left_out], indent=0)


def switched(talk: Talk, name: str) -> None:
    """Go on with another adapter, or list those that there are."""
    try:
        if name:
            talk.use(name)
    except UserError as error:
        say(f"{error}")
        return
    say("\n".join(f"{'*' if one == talk.name else ' '} {one}" for one in talk.runs))


def interruptible(talk: Talk, text: str, base: bool, beside: bool) -> None:
    """One answer, which Ctrl-C cuts short without ending the talk."""
    try:
        shown(talk, text, base, beside)
    except KeyboardInterrupt:
        say("\n(cut short)")
    except UserError as error:
        say(f"{error}")


def untuned_last(talk: Talk, text: str) -> None:
    """What the untuned model answers to the last prompt, after the same talk."""
    if not talk.writes or not text:
        say(
            "nothing to answer yet"
            if not text
            else "a classifier's untuned head is random: there is nothing to compare"
        )
        return
    kept = list(talk.history)
    del talk.history[-2:]
    try:
        spoken(talk.untuned(text), "untuned")
    except KeyboardInterrupt:
        say("\n(cut short)")
    finally:
        talk.history[:] = kept
