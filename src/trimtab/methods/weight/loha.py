"""LoHa: the elementwise product of two low-rank matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.low_rank import LowRank
from trimtab.core.site import Site


@dataclass(frozen=True)
class LoHa(LowRank):
    """W' = W + s·(B₁A₁) ∘ (B₂A₂), with s = alpha / rank.

    A₁, A₂ (rank, in) and B₁, B₂ (out, rank); the product has rank up to rank². A₁, A₂, B₁ ~ U(±1/√columns), B₂ = 0.
    Entry (o, i) is a product of two sums, so the update is one product of the row-wise Kronecker product of B₁ and B₂,
    (out, rank²), with that of A₁ and A₂, (rank², in): costs 2·rank²·(in + out) multiplications per token and never an
    (out, in) matrix; nothing after merging. Mergeable.
    FedPara, arXiv 2108.06098; LyCORIS, arXiv 2309.14859, whose code starts from normal factors of deviation 1 and 0.1:
    with alpha well over rank that diverges, so the uniform start is PEFT's.
    """

    paper: ClassVar[str] = "2108.06098"
    learning_rate: ClassVar[float] = 1.5e-3
    width_power: ClassVar[float] = 1.0

    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0

    def init(self, site: Site) -> dict[str, Any]:
        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5)))

        A1, A2 = drawn(self.rank, site.in_features), drawn(self.rank, site.in_features)
        B1, B2 = drawn(site.out_features, self.rank), nn.Parameter(torch.zeros(site.out_features, self.rank))
        return {"A1": A1, "B1": B1, "A2": A2, "B2": B2}

    def count(self, site: Site) -> int:
        return 2 * self.rank * (site.in_features + site.out_features)

    def factors(self, p: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        B = (p.B1[:, :, None] * p.B2[:, None, :]).flatten(1)  # (out, rank²)
        A = (p.A1[:, None, :] * p.A2[None, :, :]).flatten(0, 1)  # (rank², in)
        return (self.alpha / self.rank) * B, A
