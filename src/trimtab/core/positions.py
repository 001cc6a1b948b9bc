"""Edits at the ends of the prompt: which tokens these are, in padded rows and in packs, and what their methods share.

A representation method states its edit and no more; where it is made is decided here, once for training, packing and
generating.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from trimtab.core.errors import UserError, listing
from trimtab.core.method import HiddenMethod
from trimtab.core.site import Base

if TYPE_CHECKING:
    from trimtab.core.batch import Batch

Ends = tuple[int, int]
"""How many first and how many last tokens of a prompt are edited, at most."""


@dataclass(frozen=True)
class PromptEdit(HiddenMethod):
    """Abstract: h ← h + edit(h, p) at the first `first` and last `last` tokens of the prompt, after every block.

    With n prompt tokens at most ⌊n/2⌋ first and ⌈n/2⌉ last ones are edited, so none is twice; generated tokens never
    are, as long as keys and values are cached: without a cache all that a model is given is the prompt.
    """

    where: ClassVar[str] = "block"
    learning_rate: ClassVar[float] = 2e-3
    """Between the 9e-4 of the paper's 7B models, LoReFT and DiReFT alike, and the 5e-3 its code starts small runs with;
    how it goes with the width is not known."""
    reads_batch: ClassVar[bool] = True
    laws: ClassVar[dict[str, str]] = {
        "merge": "the edit depends on the position",
        "identity": "the tensors are drawn at random, as in the paper",
    }

    rank: int = 4
    first: int = 7
    last: int = 7

    def __post_init__(self) -> None:
        whole = {"rank": 1, "first": 0, "last": 0}
        problems = [
            f"{name}={value!r} is not a whole number from {least} on"
            for name, least in whole.items()
            if (value := getattr(self, name)) != int(value) or value < least
        ]
        if self.first == self.last == 0:
            problems.append("first=0 and last=0 edit nothing")
        if problems:
            raise UserError(f"{type(self).__name__}: {listing(problems)}", fix="for example rank=4, first=7, last=7")

    @property
    def ends(self) -> tuple[Ends, ...]:
        """The ends of a prompt that are edited: what packing has to know."""
        return ((self.first, self.last),)

    @abstractmethod
    def edit(self, h: Tensor, p: Any) -> Tensor:
        """What is added to h (rows, positions, width) where it is edited."""

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        h = base(x)
        at = prompt_ends(h, base.batch, self.first, self.last)
        return h if at is None else h + at * self.edit(h, p)


def prompt_ends(h: Tensor, batch: Batch | None, first: int, last: int) -> Tensor | None:
    """(rows, positions, 1), 1 at the first and last prompt tokens of each row, else 0; None while decoding."""
    if batch is None:
        prompt, order, n = h.new_ones(h.shape[:2], dtype=torch.bool), None, None
    elif batch.prompt is None:
        return None
    else:
        prompt, order, n = batch.prompt, batch.order, batch.lengths
    if order is None or n is None:
        order, n = prompt.cumsum(1) - 1, prompt.sum(1, keepdim=True)
    at_first = order < (n // 2).clamp(max=first)
    at_last = order >= n - (n - n // 2).clamp(max=last)
    return (prompt & (at_first | at_last))[..., None].to(h.dtype)


def marks(length: int, prompt: int, ends: Sequence[Ends]) -> list[tuple[bool, ...]]:
    """For each token of a row, whether each of these ends of its prompt has it: rows share tokens that agree on it."""
    n = prompt
    bounds = [(min(first, n // 2), n - min(last, n - n // 2)) for first, last in ends]
    return [tuple(at < front or back <= at < n for front, back in bounds) for at in range(length)]
