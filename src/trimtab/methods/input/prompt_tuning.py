"""Prompt tuning: trained vectors in front of the embedded text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import InputMethod
from trimtab.core.site import Site

STARTS = ("random", "vocabulary", "text")


@dataclass(frozen=True)
class PromptTuning(InputMethod):
    """X ← [P; X], where X are the embedded tokens.

    P (length, width) is all that trains. It starts as the embeddings of `length` different tokens drawn from the first
    `among` ids, the frequent ones; with `start="random"` uniform in ±0.5; with `start="text"` as those of `tokens`, cut
    at `length`, what is missing drawn as before. Adds `length` positions to every row. Not mergeable.
    arXiv 2104.08691. The released code draws its random start from [0, 0.5), not ±0.5. The paper prompts T5's encoder
    alone: where="encoder/embed". `text` is what `trimtab tune` makes `tokens` of.
    """

    paper: ClassVar[str] = "2104.08691"
    where: ClassVar[str] = "embed"
    hosts: ClassVar[frozenset[str]] = frozenset({"embedding"})
    learning_rate: ClassVar[float] = 1e-2  # the paper's 0.3 suits T5, whose embeddings are far larger

    length: int = 20
    start: str = "vocabulary"
    among: int = 5000
    text: str = ""
    tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise UserError(f"PromptTuning: start={self.start!r}", fix=f"one of {', '.join(STARTS)}")
        if self.length < 1 or self.among < self.length:
            problem = f"length={self.length}, among={self.among}"
            raise UserError(f"PromptTuning: {problem}", fix="length from 1 on, among at least as large")
        if (self.start == "text") != bool(self.text or self.tokens):
            raise UserError("PromptTuning: `text` or `tokens` belong to start='text', and it needs one of them")

    @property
    def virtual_tokens(self) -> int:
        return self.length

    def init(self, site: Site) -> dict[str, Any]:
        P = torch.rand(self.length, site.out_features) - 0.5
        if self.start != "random" and not P.is_meta:
            P = site.base(self.first_tokens(site)).to(P)
        return {"P": nn.Parameter(P)}

    def first_tokens(self, site: Site) -> Tensor:
        """Ids (length,) of the tokens the prompt starts as."""
        size = site.in_features
        if self.start == "text" and not self.tokens:
            raise UserError(
                f"PromptTuning: the ids of {self.text!r} are not known here", fix="tokens=tokenizer(text).input_ids"
            )
        wrong = [token for token in self.tokens if not 0 <= token < size]
        if wrong or self.length > size:
            raise UserError(f"PromptTuning: {site.name} has {size} tokens; length={self.length}, unknown ids {wrong}")
        drawn = torch.randperm(min(self.among, size))[: self.length]
        return torch.cat([torch.tensor(self.tokens, dtype=torch.long), drawn])[: self.length]

    def count(self, site: Site) -> int:
        return self.length * site.out_features

    def virtual(self, p: Any) -> Tensor:
        return p.P
