"""MoRA: one square matrix of high rank between a fixed compression of the input and its inverse."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import WeightMethod, dropout
from trimtab.core.site import Base, Site


@dataclass(frozen=True)
class MoRA(WeightMethod):
    """y = W x + [M R₁x₁; M R₂x₂; …], with x cut into pieces x_i of size q and R_i the rotation by position i.

    M (q, q) is trained and starts at 0, with q = ⌊√((in + out)·rank)⌉ rounded down to even: as many values as LoRA of
    that rank, but itself of rank q. R_i turns the pair (j, j + q/2) by the angle i·10000^(−2j/q), as RoPE does. x is
    filled up to a multiple of q with its own first entries; the result is cut or repeated to `out`.
    Costs in·q multiplications per token; nothing after merging. Mergeable: the update is linear in x. No alpha.
    arXiv 2405.12130, the rotating variant (official code's type 6), which the authors recommend for small ranks.
    """

    paper: ClassVar[str] = "2405.12130"
    learning_rate: ClassVar[float] = 1e-3
    width_power: ClassVar[float] = 1.0

    rank: int = 8
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"MoRA: rank={self.rank}", fix="rank of 1 or more")

    def size(self, site: Site) -> int:
        """q of a site."""
        return max(2, int(math.sqrt((site.in_features + site.out_features) * self.rank) + 0.5) // 2 * 2)

    def init(self, site: Site) -> dict[str, Any]:
        return {"M": nn.Parameter(torch.zeros(self.size(site), self.size(site)))}

    def count(self, site: Site) -> int:
        return self.size(site) ** 2

    def update(self, x: Tensor, M: Tensor, out: int) -> Tensor:
        """The update for x (..., in), of size (..., out)."""
        q = M.shape[-1]
        pieces = -(-x.shape[-1] // q)
        X = fitted(x, pieces * q).unflatten(-1, (pieces, q))  # (..., pieces, q)
        place = torch.arange(pieces, device=M.device, dtype=torch.float64)
        speed = 10000.0 ** (-torch.arange(0, q, 2, device=M.device, dtype=torch.float64) / q)
        angle = place[:, None] * speed  # (pieces, q/2)
        cos, sin = angle.cos().to(M.dtype), angle.sin().to(M.dtype)
        first, second = X.chunk(2, -1)
        X = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        return fitted((X @ M.mT).flatten(-2), out)

    def weight(self, W: Tensor, p: Any) -> Tensor:
        eye = torch.eye(W.shape[1], device=W.device, dtype=p.M.dtype)
        return W + self.update(eye, p.M, W.shape[0]).mT

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        return base(x) + self.update(dropout(x, self.dropout, p), p.M, base.shape[0])


def fitted(x: Tensor, size: int) -> Tensor:
    """x (..., n) cut to `size`, or repeated from its start up to it."""
    whole = torch.cat([x] * -(-size // x.shape[-1]), -1) if size > x.shape[-1] else x
    return whole[..., :size]
