"""A talk with a tuned model: its adapters, how prompts are worded, what was said, and the answers."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trimtab.core.errors import UserError, listing, nearest

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from trimtab.train.rundir import Run


@dataclass
class Talk:
    """A model with its adapters, how the training rows of the one in use were worded, and what was said so far."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    record: Mapping[str, Any]
    limit: int
    temperature: float
    seed: int | None
    system: str | None = None
    history: list[dict[str, str]] = field(default_factory=list)
    runs: dict[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)
    """What is typed to switch -> the adapter's name on the model, and the record of its run."""
    adapter: str = "default"
    """The adapter in use."""

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
        from trimtab.data.examples import PromptCompletion, Text
        from trimtab.data.wording import inference_prompt, source_ids
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
            activate(self.model, self.adapter)

    def use(self, name: str) -> None:
        """Go on with another run's adapter; the talk so far stays."""
        from trimtab.core.attach import activate

        if name not in self.runs:
            close = nearest(name, self.runs, 1)
            fix = f"did you mean {close[0]}?" if close else None
            raise UserError(f"no adapter {name!r}; here: {listing(self.runs)}", fix=fix)
        self.adapter, self.record = self.runs[name]
        activate(self.model, self.adapter)

    @property
    def name(self) -> str:
        """What the adapter in use is called."""
        return next((name for name, (adapter, _) in self.runs.items() if adapter == self.adapter), self.adapter)

    def add(self, name: str, run: Run, first: Run) -> None:
        """Load a further run's adapter over the same base. Errors: it was tuned on another base or worded otherwise."""
        from trimtab.core.save import load
        from trimtab.data.wording import require_same_words
        from trimtab.train.base import calibration, format_of
        from trimtab.train.rundir import ADAPTER, takes_out

        known, own = run.record["model"], first.record["model"]
        problems = []
        if known["fingerprint"] != own["fingerprint"]:
            problems.append(f"tuned on {run.recipe.model}, not {first.recipe.model}")
        for key in ("task", "labels"):
            if run.record.get(key) != first.record.get(key):
                problems.append(f"its {key} is {run.record.get(key)}, not {first.record.get(key)}")
        for key in ("quantize", "context"):
            if getattr(run.recipe, key) != getattr(first.recipe, key):
                problems.append(f"its {key} is {getattr(run.recipe, key)}, not {getattr(first.recipe, key)}")
        kept, other = format_of(run.recipe), format_of(first.recipe)
        if kept != other and run.recipe.quantize == first.recipe.quantize:
            problems.append(f"its base is kept as {kept}, not {other}")
        chosen = kept is not None and kept == other and kept.needs_inputs
        if chosen and calibration(run.directory) != calibration(first.directory):
            problems.append(f"its {type(kept).__name__} codes are of another calibration")
        folders = [one.directory / ADAPTER for one in (run, first)]
        if any(map(takes_out, folders)):
            problems.append("one of the two encodes the base's weights without a part of them")
        if not self.writes:
            problems.append("a classifier has a head of its own")
        if problems:
            raise UserError(
                f"chat: {run.directory} cannot share the model of {first.directory}: {listing(problems)}",
                fix=f"trimtab chat {run.directory}",
            )
        words = (run.record.get("data", {}).get("report") or {}).get("fingerprint")
        if words:
            require_same_words(self.tokenizer, words, str(run.directory))
        load(self.model, run.directory / ADAPTER, name, trainable=False)
        self.runs[name] = (name, run.record)

    def scores(self, text: str) -> dict[str, Any]:
        """The label of a text with the probability of every label, or the number a regression gives."""
        import torch

        from trimtab.data.batches import collate
        from trimtab.data.encode import encode
        from trimtab.data.examples import Labelled

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
