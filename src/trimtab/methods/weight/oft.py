"""OFT: rotations of the input in blocks, which keep all angles between neurons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.blocks import cayley, require_blocks, rotate
from trimtab.core.errors import UserError
from trimtab.core.method import WeightMethod
from trimtab.core.site import Base, Site


@dataclass(frozen=True)
class OFT(WeightMethod):
    """W' = W Rᵀ, R = diag(R₁ … R_n), R_i = (I + Q_i)(I − Q_i)⁻¹ with Q_i skew-symmetric: y = W (Rᵀ x) + b.

    Q_i (block_size, block_size) is stored as its strict upper triangle q (in / block_size, block_size·(block_size −
    1) / 2) = 0, so R starts as I. The input is rotated, not the weight (OFTv2), so a quantized W stays as it is. A
    `limit` above 0 keeps every ‖Q_i‖ at limit / √n after each step (COFT); `dropout` leaves that share of blocks out
    while training. Costs block_size·in multiplications per token; nothing after merging. Mergeable.
    arXiv 2306.07280, 2506.19847. R is the exact Cayley map, or with `terms` of 4 up that many of its Neumann series I +
    2Q + 2Q² + …, the last one halved: PEFT's default sums five. PEFT's exact branch gives Rᵀ.
    """

    paper: ClassVar[str] = "2306.07280"
    learning_rate: ClassVar[float] = 2e-3
    width_power: ClassVar[float] = 0.5

    block_size: int = 32
    limit: float = 0.0
    dropout: float = 0.0
    terms: int = 0

    def __post_init__(self) -> None:
        if (
            self.block_size < 2
            or self.limit < 0
            or not 0 <= self.dropout <= 1
            or not (self.terms == 0 or self.terms > 3)
        ):
            raise UserError(
                f"OFT: block_size={self.block_size}, limit={self.limit}, dropout={self.dropout}, terms={self.terms}",
                fix="block_size of 2 or more, limit of 0 or more, dropout from 0 to 1, terms of 0 or from 4 on",
            )

    def init(self, site: Site) -> dict[str, Any]:
        require_blocks("OFT", site, self.block_size, site.in_features)
        pairs = self.block_size * (self.block_size - 1) // 2
        return {"q": nn.Parameter(torch.zeros(site.in_features // self.block_size, pairs))}

    def count(self, site: Site) -> int:
        return site.in_features * (self.block_size - 1) // 2

    def rotations(self, p: Any) -> Tensor:
        """R_i, (blocks, block_size, block_size)."""
        b = self.block_size
        rows, cols = torch.triu_indices(b, b, 1, device=p.q.device)
        upper = p.q.new_zeros(*p.q.shape[:-1], b * b).index_copy(-1, rows * b + cols, p.q).unflatten(-1, (b, b))
        R = self.series(upper - upper.mT) if self.terms else cayley(upper - upper.mT)
        if self.dropout and p.training:
            off = torch.rand(R.shape[0], 1, 1, device=R.device) < self.dropout
            R = torch.where(off, torch.eye(b, dtype=R.dtype, device=R.device), R)
        return R

    def series(self, Q: Tensor) -> Tensor:
        """I + 2Q + 2Q² + … + Qⁿ⁻¹ with n = `terms`: nearly a rotation where Q is small."""
        power, total = Q, torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device) + 2 * Q
        for term in range(2, self.terms):
            power = power @ Q
            total = total + (power if term == self.terms - 1 else 2 * power)
        return total

    def weight(self, W: Tensor, p: Any) -> Tensor:
        return rotate(W, self.rotations(p).mT)

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        return base(rotate(x, self.rotations(p)))

    def row_norm(self, base: Base, p: Any) -> Tensor:
        """A rotation of the input keeps them."""
        if self.terms:
            return super().row_norm(base, p)
        return torch.linalg.vector_norm(base.weight, dim=1)

    @torch.no_grad()
    def on_step(self, p: Any, step: int) -> None:
        if self.limit:
            most = self.limit / p.q.shape[0] ** 0.5
            norm = 2**0.5 * torch.linalg.vector_norm(p.q, dim=-1, keepdim=True)  # of Q: each pair stands in it twice
            p.q.mul_((most / norm.clamp(min=1e-30)).clamp(max=1.0))
