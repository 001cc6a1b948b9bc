"""Multiple choice by log-likelihood: which continuation of a question the model finds likeliest."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.modes import evaluating
from trimtab.data.encode import encode_all
from trimtab.data.examples import PromptCompletion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPTION = re.compile(
    r"\b(?:Answer|Solution|Option|Ending)(\d+):\s*(.*?)\s*(?=(?:Answer|Solution|Option|Ending)\d+:|\n|$)"
)
NORMS = ("sum", "token", "byte")


@dataclass(frozen=True)
class Question:
    """A question, its choices, and the place of the right one."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Choice:
    """log p of each choice behind its question, the tokens and bytes of each, and the place of the right one."""

    scores: tuple[float, ...]
    tokens: tuple[int, ...]
    bytes: tuple[int, ...]
    answer: int

    def taken(self, norm: str = "sum") -> int:
        """The likeliest choice: by the sum of log p, or the sum per token or per byte."""
        sizes: Sequence[int] = {"sum": (1,) * len(self.scores), "token": self.tokens, "byte": self.bytes}[norm]
        return max(range(len(self.scores)), key=lambda at: self.scores[at] / max(1, sizes[at]))


def questions(rows: Sequence[Mapping[str, Any]], where: str = "data") -> list[Question]:
    """Questions of rows with `choices` (a list, or text with |), `question` or `prompt`, and `answer`.

    `answer` is the place of the right choice from 0, its text, or a name such as `answer2` or `B`. Rows of the
    commonsense sets (`instruction` with `Answer1: ...` in it) are read as they are.
    """
    found, problems = [], []
    for number, row in enumerate(rows, 1):
        try:
            found.append(question(row))
        except ValueError as problem:
            problems.append(f"row {number}: {problem}")
    if problems or not found:
        raise UserError(
            f"{where}: "
            + ("; ".join(problems[:3]) or "no rows")
            + (f" (+{len(problems) - 3} more)" if len(problems) > 3 else ""),
            fix="rows with question, choices and answer, the answer being the place of the right choice from 0",
        )
    return found


def question(row: Mapping[str, Any]) -> Question:
    """One row as a question; ValueError says what it lacks."""
    prompt = next((str(row[key]) for key in ("question", "prompt", "instruction") if row.get(key)), "")
    if not prompt:
        raise ValueError(f"neither question, prompt nor instruction; it has {', '.join(row)}")
    given = row.get("choices")
    if isinstance(given, str):
        given = [one.strip() for one in given.split("|")]
    if isinstance(given, Mapping):
        given = given.get("text")
    if not given:
        given = [text for _, text in OPTION.findall(prompt)] or yes_or_no(prompt)
    choices = tuple(map(str, given))
    if len(choices) < 2:
        raise ValueError("fewer than two choices")
    if "answer" not in row:
        raise ValueError("no answer")
    return Question(prompt, choices, place_of(row["answer"], choices))


def yes_or_no(prompt: str) -> list[str]:
    """The choices that a line `Answer format: true/false` names."""
    _, found, rest = prompt.partition("Answer format:")
    return rest.strip().split("/") if found else []


def place_of(answer: Any, choices: Sequence[str]) -> int:
    """Which choice an answer means; ValueError where it means none."""
    text = str(answer).strip()
    if text in choices:
        return choices.index(text)
    number = re.fullmatch(r"(?:[A-Za-z]+)?(\d+)", text)
    if number:
        place = int(number[1]) - (1 if text[:1].isalpha() else 0)
    elif len(text) == 1 and text.isalpha():
        place = ord(text.upper()) - ord("A")
    else:
        place = -1
    if not 0 <= place < len(choices):
        raise ValueError(f"the answer {text!r} is none of {len(choices)} choices")
    return place


@torch.no_grad()
def score(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Question],
    *,
    shared: bool = True,
    separator: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> list[Choice]:
    """log p of every choice behind its question, worded as a training row of prompt and completion is.

    `shared`: the tokens that all choices of a question begin with are computed once and their keys and values kept for
    the choices' own; else every choice is computed whole. Both give the same numbers but for rounding.
    """
    rows = [PromptCompletion(one.prompt, choice) for one in asked for choice in one.choices]
    made = encode_all(rows, tokenizer, max_length=None, separator=separator) if rows else ()
    if len(made) != len(rows):
        raise UserError(f"choices: {len(rows) - len(made)} of {len(rows)} choices have no tokens", fix="leave them out")
    encoded = iter(made)
    found = []
    with evaluating(model):
        for done, one in enumerate(asked, 1):
            own = [next(encoded) for _ in one.choices]
            ids, wanted = [list(row.ids) for row in own], [list(row.trained) for row in own]
            scores = together(model, ids, wanted) if shared else apart(model, ids, wanted)
            tokens, sizes = tuple(map(sum, wanted)), tuple(len(choice.encode()) for choice in one.choices)
            found.append(Choice(tuple(scores), tokens, sizes, one.answer))
            if progress is not None:
                progress(done, len(asked))
    return found


def apart(model: nn.Module, ids: Sequence[list[int]], wanted: Sequence[list[bool]]) -> list[float]:
    """Every choice with its question, in one padded batch."""
    device = next(model.parameters()).device
    batch, mask = padded(ids, device)
    logits = model(input_ids=batch, attention_mask=mask, use_cache=False).logits
    return [summed(logits[row, : len(one) - 1], one[1:], wanted[row][1:]) for row, one in enumerate(ids)]


def together(model: nn.Module, ids: Sequence[list[int]], wanted: Sequence[list[bool]]) -> list[float]:
    """The common beginning once; then the choices' own tokens, behind copies of its keys and values."""
    from transformers import DynamicCache

    device = next(model.parameters()).device
    own = min(next((at for at, used in enumerate(one) if used), len(one)) for one in wanted)
    start = min(own, *(len(one) - 1 for one in ids))
    while any(one[:start] != ids[0][:start] for one in ids):
        start -= 1
    if start < 1:
        return apart(model, ids, wanted)
    known = inspect.signature(model.forward).parameters
    only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    first = model(input_ids=torch.tensor([ids[0][:start]], device=device), use_cache=True, **only)
    cache: Any = first.past_key_values
    if not isinstance(cache, DynamicCache):
        return apart(model, ids, wanted)
    last = first.logits[0, -1:].clone()
    cache.batch_repeat_interleave(len(ids))
    held = cache.get_seq_length()
    batch, mask = padded([one[start:] for one in ids], device)
    before = mask.new_ones(len(ids), held)
    positions = torch.arange(start, start + batch.shape[1], device=device).expand(len(ids), -1)
    logits = model(
        input_ids=batch,
        attention_mask=torch.cat([before, mask], 1),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).logits
    found = []
    for row, one in enumerate(ids):
        each = torch.cat([last, logits[row, : len(one) - start - 1]])
        found.append(summed(each, one[start:], wanted[row][start:]))
    return found


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids padded at the right, and 1 where they are none of the padding."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return ids, mask


def summed(logits: Tensor, targets: Sequence[int], wanted: Sequence[bool]) -> float:
    """Σ log p(target) over the wanted positions."""
    goal = torch.tensor(targets, device=logits.device)
    each = F.log_softmax(logits.float(), -1).gather(1, goal[:, None])[:, 0]
    return float(each[torch.tensor(wanted, device=logits.device)].sum())


def accuracies(found: Sequence[Choice]) -> dict[str, float]:
    """Share of questions whose likeliest choice is the right one, by every norm."""
    return {f"accuracy_{norm}": sum(one.taken(norm) == one.answer for one in found) / len(found) for norm in NORMS}
