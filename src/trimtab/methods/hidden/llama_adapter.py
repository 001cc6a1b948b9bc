"""LLaMA-Adapter: a prompt in the top layers whose part in each attention is gated, and starts at nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.attention import at_prompt
from trimtab.core.errors import UserError
from trimtab.core.method import HiddenMethod
from trimtab.core.site import Base, Site


@dataclass(frozen=True)
class LLaMAAdapter(HiddenMethod):
    """head = softmax(q kᵀ/√size) v + tanh(g)·softmax(q (P W_kᵀ)ᵀ/√size) P W_vᵀ.

    The two softmaxes are apart: tokens keep their attention, and the prompt adds to it. P (length, width) of a layer
    starts at N(0, 1) and goes through the frozen projections, unrotated; g (heads) starts at zero. By default in the
    top 30 layers. Costs 2·length·width multiplications per token and layer, and projecting P once a forward. Not
    mergeable.
    arXiv 2303.16199, with the gate of the official code: a tanh, one per head. PEFT has one gate a layer and no tanh.
    """

    paper: ClassVar[str] = "2303.16199"
    where: ClassVar[str] = "attention@-30:"
    hosts: ClassVar[frozenset[str]] = frozenset({"attention"})
    learning_rate: ClassVar[float] = 5e-3  # P has entries of size 1; the official code takes 9e-3
    laws: ClassVar[dict[str, str]] = {"merge": "the prompt's part depends on the query through a softmax"}

    length: int = 10

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UserError(f"LLaMAAdapter: length={self.length}", fix="from 1 on")

    def init(self, site: Site) -> dict[str, Any]:
        P = torch.randn(self.length, site.in_features)
        return {"P": nn.Parameter(P), "g": nn.Parameter(torch.zeros(site.heads))}

    def count(self, site: Site) -> int:
        return self.length * site.in_features + site.heads

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        k, v, scale = at_prompt(base, p.P, x)
        share = torch.softmax((x @ k.mT) * scale, -1)  # (rows, heads, tokens, length)
        return base(x) + torch.tanh(p.g)[:, None, None] * (share @ v)
