"""`trimtab chat`: talk to a tuned model, with the untuned one beside it on request."""

from __future__ import annotations

import sys
from collections.abc import Generator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trimtab.cli.verb import Verb, columns, figure, is_machine, say
from trimtab.core.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from trimtab.train.rundir import Run

COMMANDS = "/base the untuned model's answer   /reset forget the talk   /quit"


@dataclass
class Talk:
    """A model with its adapter, how its training rows were worded, and what was said so far."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    record: Mapping[str, Any]
    limit: int
    temperature: float
    seed: int | None
    system: str | None = None
    history: list[dict[str, str]] = field(default_factory=list)

    @property
    def task(self) -> str:
        return str(self.record.get("task", "causal"))

    @property
    def writes(self) -> bool:
        """Whether the model answers in words, not with a label or a number."""
        return self.task in ("causal", "seq2seq")

    @property
    def chats(self) -> bool:
        """Whether the model was tuned with a chat template, so that turns follow each other."""
        return self.task == "causal" and self.report.get("template") == "chat"

    @property
    def report(self) -> Mapping[str, Any]:
        """What encoding the training rows reported."""
        found: Mapping[str, Any] = (self.record.get("data") or {}).get("report") or {}
        return found

    def prompt_ids(self, text: str, history: list[dict[str, str]]) -> list[int]:
        """The token ids to answer from, worded as in training; the oldest turns go when there are too many tokens."""
        from trimtab.data.encode import inference_prompt, source_ids
        from trimtab.data.forms import PromptCompletion, Text
        from trimtab.evaluate.generate import room_of

        if self.task == "seq2seq":
            return source_ids(text, self.tokenizer, separator=str(self.report.get("separator", "")))
        if not self.chats:
            plain = Text(text) if (self.record.get("data") or {}).get("form") == "text" else PromptCompletion(text, "")
            separator = str(self.report.get("separator", ""))
            return inference_prompt(plain, self.tokenizer, template="plain", separator=separator)
        opening = [{"role": "system", "content": self.system}] if self.system else []
        room = room_of(self.model) - min(self.limit, room_of(self.model) // 2)
        while True:
            messages = [*opening, *history, {"role": "user", "content": text}]
            ids = inference_prompt(messages, self.tokenizer, template="chat")
            if len(ids) <= room or not history:
                return ids
            del history[:2]

    def answer(self, text: str, *, remember: bool = True) -> Generator[str, None, None]:
        """Pieces of the answer to `text`."""
        from trimtab.evaluate.generate import stream

        said = []
        ids = self.prompt_ids(text, self.history)
        for piece in stream(self.model, self.tokenizer, ids, self.limit, self.temperature, self.seed):
            said.append(piece)
            yield piece
        if remember and self.chats:
            self.history += [{"role": "user", "content": text}, {"role": "assistant", "content": "".join(said)}]

    def untuned(self, text: str) -> Generator[str, None, None]:
        """Pieces of the answer of the model without its adapter; nothing is remembered."""
        from trimtab.core.attach import activate

        activate(self.model, None)
        try:
            yield from self.answer(text, remember=False)
        finally:
            activate(self.model, "default")

    def scores(self, text: str) -> dict[str, Any]:
        """The label of a text with the probability of every label, or the number a regression gives."""
        import torch

        from trimtab.data.batches import collate
        from trimtab.data.encode import encode
        from trimtab.data.forms import Labelled

        first, tab, second = text.partition("\t")
        labels = self.record.get("labels")
        example = Labelled(first, second if tab else None, labels[0] if labels else 0.0)
        row = encode(
            example,
            self.tokenizer,
            max_length=self.report.get("max_length"),
            truncation="right",
            labels=tuple(labels) if labels else "regression",
        )
        batch = collate([row], self.tokenizer.pad_token_id or 0)
        device = next(self.model.parameters()).device
        with torch.no_grad():
            logits = self.model(**{key: value.to(device) for key, value in batch.items() if key != "labels"}).logits[0]
        if not labels:
            return {"prompt": text, "value": float(logits.float().squeeze())}
        shares = dict(zip(labels, torch.softmax(logits.float(), -1).tolist(), strict=True))
        return {"prompt": text, "label": max(shares, key=lambda label: shares[label]), "probabilities": shares}


@click.command(cls=Verb, name="chat", short_help="Talk to a tuned model.")
@click.argument("directory", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--prompt", help="Answer this and exit; without it, prompts come from the terminal or line by line.")
@click.option("--base", is_flag=True, help="Show the untuned model's answer too.")
@click.option("--system", help="A system prompt, for chat models.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Longest answer.")
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0: the likeliest answer."
)
@click.option("--seed", type=int, help="Seed of the draws at a temperature above 0.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or mps.")
def command(
    directory: Path,
    prompt: str | None,
    base: bool,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    seed: int | None,
    device: str,
) -> list[dict[str, Any]] | dict[str, Any]:
    """Talk to the model of a run. Prompts are worded exactly as its training rows were.

    A chat model remembers the talk; a model without a chat template continues the text. A classifier prints its label
    with the probabilities; for a pair of texts, put a tab between them.
    """
    from trimtab.models.starters import quiet_transformers

    run = opened(directory)
    with quiet_transformers():
        model, tokenizer = run.load(device)
    talk = Talk(model, tokenizer, run.record, max_new_tokens, temperature, seed, system)
    if talk.writes and system and not talk.chats:
        raise UserError("chat: this run was not tuned with a chat template, so there is no system prompt")
    if prompt is not None:
        return shown(talk, prompt, base, label=False)
    if sys.stdin.isatty() and not is_machine():
        converse(talk, base)
        return []
    # Lines of a file are questions of their own: none of them follows from the one before.
    answers = []
    for line in filter(None, (line.rstrip("\n") for line in sys.stdin)):
        talk.history.clear()
        answers.append(shown(talk, line, base, label=False))
    return answers


def opened(directory: Path) -> Run:
    """A run that has an adapter."""
    from trimtab.train.rundir import ADAPTER, open_run

    run = open_run(directory)
    if not (run.directory / ADAPTER).is_dir():
        status = run.record.get("status", "unfinished") if isinstance(run.record, dict) else "damaged"
        raise UserError(f"chat: {directory} has no adapter: the run is {status}", fix="train it to the end")
    return run


def shown(talk: Talk, text: str, base: bool, *, label: bool = True) -> dict[str, Any]:
    """Answer one prompt on the terminal as it comes; returns it as plain data."""
    if not text.strip():
        raise UserError("chat: the prompt is empty")
    if not talk.writes:
        scores = talk.scores(text)
        say(scores_text(scores))
        return scores
    found = {"prompt": text}
    if base:
        found["base"] = spoken(talk.untuned(text), "untuned")
    found["answer"] = spoken(talk.answer(text), "tuned" if base else "model" if label else "")
    return found


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


def converse(talk: Talk, base: bool) -> None:
    """Prompts from the terminal, until /quit or the end of input."""
    say(COMMANDS if talk.writes else "one text per line; /quit ends")
    with suppress(ImportError):
        import readline  # noqa: F401 - gives `input` its line editing
    last = ""
    while True:
        try:
            text = input("you> ").strip()
        except EOFError:
            say()
            return
        except KeyboardInterrupt:
            say()
            return
        if text in ("/quit", "/exit", "/q"):
            return
        if text == "/reset":
            talk.history.clear()
            say("forgotten")
        elif text == "/base":
            side_by_side(talk, last)
        elif text.startswith("/"):
            say(COMMANDS)
        elif text:
            last = text
            interruptible(talk, text, base)


def interruptible(talk: Talk, text: str, base: bool) -> None:
    """One answer, which Ctrl-C cuts short without ending the talk."""
    try:
        shown(talk, text, base)
    except KeyboardInterrupt:
        say("\n(cut short)")
    except UserError as error:
        say(f"{error}")


def side_by_side(talk: Talk, text: str) -> None:
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
    finally:
        talk.history[:] = kept
