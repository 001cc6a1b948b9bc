"""LoRA-FA: LoRA with the reading factor frozen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.low_rank import LowRank
from trimtab.core.site import Site


@dataclass(frozen=True)
class LoRAFA(LowRank):
    """W' = W + s·B A with A frozen, s = alpha / rank.

    A (rank, in) ~ U(±1/√in) is drawn once and fixed, B (out, rank) = 0 is trained. Backward then needs A x (rank values
    per token) and not x, which is most of what LoRA keeps; with dropout the saving is lost.
    Costs 2·rank·(in + out) multiplications per token and no gradient of A; nothing after merging. Mergeable.
    arXiv 2308.03303. PEFT also rescales B's gradient by (A Aᵀ)⁻¹, which belongs to the update and is not in the paper.
    """

    paper: ClassVar[str] = "2308.03303"
    learning_rate: ClassVar[float] = 3e-3
    width_power: ClassVar[float] = 1.0

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0

    def init(self, site: Site) -> dict[str, Any]:
        A = nn.init.kaiming_uniform_(torch.empty(self.rank, site.in_features), a=math.sqrt(5))
        return {"A": A, "B": nn.Parameter(torch.zeros(site.out_features, self.rank))}

    def count(self, site: Site) -> int:
        return self.rank * site.out_features

    def factors(self, p: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return (self.alpha / self.rank) * p.B, p.A
