"""HiRA: an update of high rank, the frozen weight times a low-rank matrix, entry by entry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import WeightMethod
from trimtab.core.site import Site


@dataclass(frozen=True)
class HiRA(WeightMethod):
    """W' = W + W ∘ (B A): every weight is rescaled by a factor of its own, 1 + (B A).

    A (rank, in) ~ U(±1/√in), B (out, rank) = 0. The rank of the update is bounded by rank(W)·rank, not by rank.
    Costs rank·in·out multiplications per step, not per token, to build W'; nothing after merging. Mergeable.
    ICLR 2025 (OpenReview TwJrTz9cRS), no arXiv id. There is no alpha; since W is small, it wants a larger learning rate
    than LoRA.
    """

    learning_rate: ClassVar[float] = 8e-3
    width_power: ClassVar[float] = 0.5
    laws: ClassVar[Mapping[str, str]] = {"cost": "W enters the update entry by entry, so W' itself is built"}

    rank: int = 32

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"HiRA: rank={self.rank}", fix="rank of 1 or more")

    def init(self, site: Site) -> dict[str, Any]:
        A = nn.init.kaiming_uniform_(torch.empty(self.rank, site.in_features), a=math.sqrt(5))
        return {"A": nn.Parameter(A), "B": nn.Parameter(torch.zeros(site.out_features, self.rank))}

    def count(self, site: Site) -> int:
        return self.rank * (site.in_features + site.out_features)

    def weight(self, W: Tensor, p: Any) -> Tensor:
        return torch.addcmul(W, W, p.B @ p.A)
