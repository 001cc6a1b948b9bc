"""DyLoRA: LoRA whose leading ranks are trained to work without the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.low_rank import LowRank
from trimtab.core.method import dropout
from trimtab.core.site import Base, Site


@dataclass(frozen=True)
class DyLoRA(LowRank):
    """W' = W + (alpha / b)·B[:, :b] A[:b], with b drawn anew for each step of training from `lowest` … `rank`.

    A (rank, in) ~ U(±1/√in), B (out, rank) = 0; b, the same at all sites, follows from the step's number. Outside
    training b is `used` (0: rank): one training gives an adapter for every rank, `DyLoRA(used=4)` of the same tensors.
    Costs 2·rank·(in + out) multiplications per token; nothing after merging. Mergeable, at rank `used`.
    arXiv 2210.07558, the version that updates all rows up to b. The scale is alpha / b, as in the paper.
    """

    paper: ClassVar[str] = "2210.07558"
    learning_rate: ClassVar[float] = 1.5e-3
    width_power: ClassVar[float] = 1.0

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    lowest: int = 1
    used: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.lowest <= self.rank or not 0 <= self.used <= self.rank:
            raise UserError(
                f"DyLoRA: rank={self.rank}, lowest={self.lowest}, used={self.used}",
                fix="1 <= lowest <= rank, and used from 0 to rank",
            )

    def init(self, site: Site) -> dict[str, Any]:
        A = nn.init.kaiming_uniform_(torch.empty(self.rank, site.in_features), a=math.sqrt(5))
        B = torch.zeros(site.out_features, self.rank)
        return {"A": nn.Parameter(A), "B": nn.Parameter(B), "b": torch.tensor(self.rank_at(1))}

    def rank_at(self, step: int) -> int:
        """b of a step."""
        draw = torch.Generator().manual_seed(step)
        return int(torch.randint(self.lowest, self.rank + 1, (), generator=draw, device="cpu"))

    def on_step(self, p: Any, step: int) -> None:
        p.b.fill_(self.rank_at(step + 1))

    def count(self, site: Site) -> int:
        return self.rank * (site.in_features + site.out_features)

    def factors(self, p: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        used = self.used or self.rank
        return (self.alpha / used) * p.B[:, :used], p.A[:used]

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        if not p.training:
            return super().forward(x, base, p)
        scale = self.alpha / p.b * (torch.arange(self.rank, device=p.b.device) < p.b)
        low = base.affine(dropout(x, self.dropout, p), p.A) * scale.to(p.A.dtype)
        return base(x) + low @ p.B.mT
