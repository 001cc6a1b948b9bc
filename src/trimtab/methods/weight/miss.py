"""MiSS: one small matrix, shared by all pieces of the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.low_rank import LowRank
from trimtab.core.method import dropout
from trimtab.core.site import Base, Site


@dataclass(frozen=True)
class MiSS(LowRank):
    """y = W x + Dᵀ Σ_g x_g, where x is cut into pieces x_g of `rank` entries; so ΔW repeats Dᵀ along the input.

    D (rank, out) = 0; a last short piece is filled with zeros. With `columns` D is (rank, columns) and is repeated
    along the output too (mini). Costs in + rank·out multiplications and additions per token, the least of all low-rank
    methods, and keeps only the sum for backward; nothing after merging. Mergeable.
    arXiv 2409.15371, earlier named Bone. There is no alpha.
    """

    paper: ClassVar[str] = "2409.15371"
    learning_rate: ClassVar[float] = 3e-4  # 1e-4 at a width of 3,072, as PEFT compares it
    width_power: ClassVar[float] = 1.0

    rank: int = 64
    dropout: float = 0.0
    columns: int | None = None

    def init(self, site: Site) -> dict[str, Any]:
        if self.columns and site.out_features % self.columns:
            raise UserError(f"MiSS: columns={self.columns} do not divide {site.out_features} of {site.name}")
        return {"D": nn.Parameter(torch.zeros(self.rank, self.columns or site.out_features))}

    def count(self, site: Site) -> int:
        return self.rank * (self.columns or site.out_features)

    def factors(self, p: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        out, into = shape[-2:]
        pieces = -(-into // self.rank)
        A = torch.eye(self.rank, dtype=p.D.dtype, device=p.D.device).repeat(1, pieces)[:, :into]
        return p.D.repeat(1, out // p.D.shape[1]).mT, A

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        y, x = base(x), dropout(x, self.dropout, p)
        filled = F.pad(x, (0, -x.shape[-1] % self.rank))
        small = filled.unflatten(-1, (-1, self.rank)).sum(-2) @ p.D
        return y + (small if self.columns is None else small.repeat(*[1] * (x.ndim - 1), y.shape[-1] // self.columns))
