"""SHiRA: a few percent of a weight's entries, chosen before training, of any rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.mask import Sparse
from trimtab.core.site import Site

MASKS = ("random", "magnitude", "structured")


@dataclass(frozen=True)
class SHiRA(Sparse):
    """W' = W + Σ_i v_i at rank·(in + out) fixed entries, as many values as LoRA trains, but not of low rank.

    `index` (k) holds flat places of W: `random` ones, the largest |W| (`magnitude`), or evenly spaced rows and columns
    with the diagonal (`structured`); `value` (k) starts at 0. Costs k multiplications per token, and no dense
    gradient; switching adapters scatters k values. Mergeable.
    arXiv 2406.13175. Its masks by gradient are `FishMask` with squared gradients.
    """

    paper: ClassVar[str] = "2406.13175"

    rank: int = 32
    mask: str = "random"

    def __post_init__(self) -> None:
        if self.mask not in MASKS or self.rank < 1:
            raise UserError(f"SHiRA: mask={self.mask!r}, rank={self.rank}", fix=f"one of {', '.join(MASKS)}; rank 1 up")

    def init(self, site: Site) -> dict[str, Any]:
        return {"index": self.index(site), "value": nn.Parameter(torch.zeros(self.count(site)))}

    def index(self, site: Site) -> Tensor:
        """Flat places of the trained entries, in order."""
        size, W = self.count(site), site.base.weight
        if W.is_meta:
            return torch.empty(size, dtype=torch.long)
        if self.mask == "random":
            return torch.randperm(W.numel())[:size].sort().values
        if self.mask == "magnitude":
            return W.detach().abs().flatten().topk(size).indices.cpu().sort().values
        out, into = W.shape
        rows, cols = (torch.linspace(0, length - 1, min(self.rank, length)).long() for length in (out, into))
        rank = torch.full((out, into), 2)  # first the diagonal, then whole rows and columns, then what is left
        rank[rows], rank[:, cols] = 1, 1
        rank.fill_diagonal_(0)
        return rank.flatten().argsort(stable=True)[:size].sort().values

    def count(self, site: Site) -> int:
        return min(self.rank * (site.in_features + site.out_features), site.in_features * site.out_features)
