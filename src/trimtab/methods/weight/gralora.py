"""GraLoRA: a LoRA of its own for every block of the weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import WeightMethod, dropout
from trimtab.core.site import Base, Site


@dataclass(frozen=True)
class GraLoRA(WeightMethod):
    """W'_oi = W_oi + s·B_oi A_oi for each block of a grid of `blocks` × `blocks`, with s = alpha / rank.

    A_oi (rank / blocks, in / blocks) ~ U(±√(blocks / in)) and B_oi (out / blocks, rank / blocks) = 0; all of a column
    of blocks are kept as A[i] (rank, in / blocks), all of a row as B[o] (out / blocks, rank). As many values and
    multiplications as LoRA of that rank, 2·rank·(in + out) per token, and an update of rank up to blocks·rank; an
    outlier channel of x reaches one column of blocks only. Nothing after merging. Mergeable.
    arXiv 2505.20355. Sides that do not divide are padded with zeros; the official code refuses them.
    """

    paper: ClassVar[str] = "2505.20355"
    learning_rate: ClassVar[float] = 1.5e-3
    width_power: ClassVar[float] = 1.0

    rank: int = 32
    alpha: float = 64.0
    blocks: int = 2
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.blocks < 1 or self.rank % self.blocks:
            raise UserError(
                f"GraLoRA: rank={self.rank} does not split over blocks={self.blocks}",
                fix=f"rank={max(1, self.rank // max(1, self.blocks)) * max(1, self.blocks)}",
            )

    def init(self, site: Site) -> dict[str, Any]:
        A = torch.empty(self.blocks, self.rank, -(-site.in_features // self.blocks))
        for one in A:
            nn.init.kaiming_uniform_(one, a=math.sqrt(5))
        B = torch.zeros(self.blocks, -(-site.out_features // self.blocks), self.rank)
        return {"A": nn.Parameter(A), "B": nn.Parameter(B)}

    def count(self, site: Site) -> int:
        return self.blocks * self.rank * (-(-site.in_features // self.blocks) - (-site.out_features // self.blocks))

    def update(self, x: Tensor, p: Any, out: int) -> Tensor:
        """The update for x (..., in), of size (..., out)."""
        grid, width = self.blocks, p.A.shape[-1]
        X = F.pad(x, (0, grid * width - x.shape[-1])).unflatten(-1, (grid, width))  # (..., i, in/blocks)
        low = torch.einsum("...iw,irw->...ir", X, p.A).unflatten(-1, (grid, -1))  # (..., i, o, rank/blocks)
        low = low.transpose(-3, -2).flatten(-2)  # (..., o, rank)
        y = torch.einsum("...or,ovr->...ov", low, (self.alpha / self.rank) * p.B)
        return y.flatten(-2)[..., :out]

    def weight(self, W: Tensor, p: Any) -> Tensor:
        eye = torch.eye(W.shape[1], device=W.device, dtype=p.A.dtype)
        return W + self.update(eye, p, W.shape[0]).mT

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        return base(x) + self.update(dropout(x, self.dropout, p), p, base.shape[0])
