"""MaskLoRA: LoRA on a pruned weight that leaves its zeros alone."""

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
class MaskLoRA(WeightMethod):
    """W' = W + s·(B A) ∘ 1[W ≠ 0], with s = alpha / rank.

    A (rank, in) ~ U(±1/√in), B (out, rank) = 0. The merged weight is exactly as sparse as W, where LoRA's is dense.
    Costs rank·in·out multiplications per step, not per token, to build W'; nothing after merging. Mergeable.
    PERP, arXiv 2312.15230. There is no dropout, as in the official code: a masked product has no branch of its own.
    """

    paper: ClassVar[str] = "2312.15230"
    learning_rate: ClassVar[float] = 1.5e-3
    width_power: ClassVar[float] = 1.0
    """As LoRA, which it is on a weight without zeros."""
    laws: ClassVar[Mapping[str, str]] = {"cost": "zeros of W mask the product entry by entry, so W' itself is built"}

    rank: int = 16
    alpha: float = 32.0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise UserError(f"MaskLoRA: rank={self.rank!r}, alpha={self.alpha!r}", fix="for example rank=16, alpha=32")

    def init(self, site: Site) -> dict[str, Any]:
        A = nn.init.kaiming_uniform_(torch.empty(self.rank, site.in_features), a=math.sqrt(5))
        return {"A": nn.Parameter(A), "B": nn.Parameter(torch.zeros(site.out_features, self.rank))}

    def count(self, site: Site) -> int:
        return self.rank * (site.in_features + site.out_features)

    def weight(self, W: Tensor, p: Any) -> Tensor:
        return W + ((self.alpha / self.rank) * p.B @ p.A).masked_fill(W == 0, 0)
