"""SSF: scale and shift what every layer puts out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.method import WeightMethod
from trimtab.core.site import Base, Site


@dataclass(frozen=True)
class SSF(WeightMethod):
    """y ← γ ∘ y + β after every linear layer and norm; so W' = diag(γ) W and b' = γ ∘ b + β.

    γ (out) starts at 1, β (out) at 0; an RMS norm, which has no offset, gets no β. One multiplication and one addition
    per channel and token; nothing after merging. Mergeable.
    arXiv 2210.08823. The official code draws γ ~ N(1, 0.02²) and β ~ N(0, 0.02²), which changes the model before the
    first step; exact ones and zeros do not.
    """

    paper: ClassVar[str] = "2210.08823"
    where: ClassVar[str] = "all-linear, norm"
    hosts: ClassVar[frozenset[str]] = frozenset({"linear", "norm", "conv"})
    learning_rate: ClassVar[float] = 5e-3

    def init(self, site: Site) -> dict[str, Any]:
        gamma = {"gamma": nn.Parameter(torch.ones(site.out_features))}
        return gamma | {"beta": nn.Parameter(torch.zeros(site.out_features))} if site.takes_bias else gamma

    def count(self, site: Site) -> int:
        return site.out_features * (2 if site.takes_bias else 1)

    def weight(self, W: Tensor, p: Any) -> Tensor:
        return p.gamma[..., None] * W

    def bias(self, b: Tensor | None, p: Any) -> Tensor | None:
        beta = getattr(p, "beta", None)
        return beta if b is None else p.gamma * b + p.beta

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        return torch.addcmul(p.beta, p.gamma, base(x)) if hasattr(p, "beta") else p.gamma * base(x)
