"""ScaleLoRA: a pruned weight times a low-rank matrix, entry by entry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import WeightMethod
from trimtab.core.site import Site


@dataclass(frozen=True)
class ScaleLoRA(WeightMethod):
    """W' = W ∘ (B A): every weight is rescaled, and a zero stays a zero.

    A (rank, in) and B (out, rank) start at 1/√rank, so B A is 1 everywhere; exactly, where √rank is a power of two.
    Costs rank·in·out multiplications per step, not per token, to build W'; nothing after merging. Mergeable.
    PERP, arXiv 2312.15230. All rows of A start alike and get the same gradient, so under any optimizer that treats them
    alike B A stays of rank one whatever `rank`, a product of one factor per output and one per input.
    """

    paper: ClassVar[str] = "2312.15230"
    learning_rate: ClassVar[float] = 1e-3
    """B A starts at 1 and W is small: relative steps, as for the gains of a norm."""
    laws: ClassVar[Mapping[str, str]] = {"cost": "W enters the update entry by entry, so W' itself is built"}

    rank: int = 16

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"ScaleLoRA: rank={self.rank!r}", fix="rank of 1 or more")

    def init(self, site: Site) -> dict[str, Any]:
        start = self.rank**-0.5
        return {
            "A": nn.Parameter(torch.full((self.rank, site.in_features), start)),
            "B": nn.Parameter(torch.full((site.out_features, self.rank), start)),
        }

    def count(self, site: Site) -> int:
        return self.rank * (site.in_features + site.out_features)

    def weight(self, W: Tensor, p: Any) -> Tensor:
        return W * (p.B @ p.A)
