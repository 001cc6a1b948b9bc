"""LoKr: a Kronecker product, its larger factor of low rank."""

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
class LoKr(WeightMethod):
    """W' = W + s·C ⊗ D, with D = B A and s = alpha / rank where that saves anything, else D full and s = 1.

    With out = h·k and in = m·n: C (h, m), A (rank, n), B (k, rank) or D (k, n). h and m are the largest divisors of out
    and in up to their square roots, and up to `factor` where it is not 0. C and A ~ U(±1/√columns), B or D = 0.
    For x seen as X (m, n) the update is C X Dᵀ: costs m·rank·(n + k) + h·m·k multiplications per token and builds no
    (out, in) matrix; nothing after merging. Mergeable.
    LyCORIS, arXiv 2309.14859. D is full when rank ≥ max(k, n) / 2, and s = 1 then, as in the authors' code; PEFT keeps
    alpha / rank there, and starts from C = 0 where a zero D is the authors' choice.
    """

    paper: ClassVar[str] = "2309.14859"
    learning_rate: ClassVar[float] = 3e-3
    width_power: ClassVar[float] = 1.0

    rank: int = 8
    alpha: float = 8.0
    factor: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.factor < 0:
            raise UserError(
                f"LoKr: rank={self.rank}, factor={self.factor}", fix="rank of 1 or more, factor of 0 or more"
            )

    def sides(self, site: Site) -> tuple[int, int, int, int]:
        """h, k, m, n."""
        h, m = self.divisor(site.out_features), self.divisor(site.in_features)
        return h, site.out_features // h, m, site.in_features // m

    def divisor(self, size: int) -> int:
        most = min(self.factor or size, math.isqrt(size))
        return next(one for one in range(most, 0, -1) if size % one == 0)

    def full(self, k: int, n: int) -> bool:
        return 2 * self.rank >= max(k, n)

    def init(self, site: Site) -> dict[str, Any]:
        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5)))

        h, k, m, n = self.sides(site)
        if self.full(k, n):
            return {"C": drawn(h, m), "D": nn.Parameter(torch.zeros(k, n))}
        return {"C": drawn(h, m), "A": drawn(self.rank, n), "B": nn.Parameter(torch.zeros(k, self.rank))}

    def count(self, site: Site) -> int:
        h, k, m, n = self.sides(site)
        return h * m + (k * n if self.full(k, n) else self.rank * (k + n))

    def weight(self, W: Tensor, p: Any) -> Tensor:
        D = p.D if hasattr(p, "D") else (self.alpha / self.rank) * p.B @ p.A
        return W + (p.C[:, None, :, None] * D[None, :, None, :]).reshape(W.shape)

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        X = dropout(x, self.dropout, p).unflatten(-1, (p.C.shape[1], -1))  # (..., m, n)
        low, high = (X, p.D) if hasattr(p, "D") else (X @ p.A.mT, (self.alpha / self.rank) * p.B)
        H = low @ high.mT  # (..., m, k)
        return base(x) + (p.C @ H).flatten(-2)
