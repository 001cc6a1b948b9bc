"""Compacter: Houlsby's adapter with both matrices put together from small ones that all sites share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import HiddenMethod
from trimtab.core.site import Base, Site


@dataclass(frozen=True)
class Compacter(HiddenMethod):
    """h ← h + g(h D + d) U + u, g = GELU, with D and U = Σ_i A_i ⊗ S_i T_i over `blocks` terms (h a row).

    A (blocks, blocks, blocks) ~ N(0, 1e-4²) is trained once for both matrices of all sites. D (width, bottleneck) has
    S (blocks, width / blocks, rank) and T (blocks, rank, bottleneck / blocks) ~ U(±√(12 / sum of its sides)), U the
    same the other way round; d (bottleneck) and u (width) zero: with so small an A nearly the identity at first.
    Trains 2·rank·(width + bottleneck) + bottleneck + width values a site. Costs 4·bottleneck·width multiplications per
    token and site, also at inference, and putting D and U together once a forward: not mergeable.
    arXiv 2106.04647. Its counts include the layer norms: put `LNTuning()` beside it. The code takes the tanh form of
    GELU.
    """

    paper: ClassVar[str] = "2106.04647"
    where: ClassVar[str] = "attn, ffn"
    learning_rate: ClassVar[float] = 3e-3  # the paper's, ten times that of its adapters: A starts at 1e-4
    laws: ClassVar[Mapping[str, str]] = {"merge": "the GELU between D and U"}

    bottleneck: int = 24
    blocks: int = 4
    rank: int = 1

    def __post_init__(self) -> None:
        if self.blocks < 1 or self.rank < 1 or self.bottleneck % self.blocks:
            raise UserError(
                f"Compacter: bottleneck={self.bottleneck}, blocks={self.blocks}, rank={self.rank}",
                fix="a bottleneck that `blocks` divides, rank of 1 or more",
            )

    def shared(self, sites: Sequence[Site]) -> dict[str, Any]:
        return {"A": nn.Parameter(1e-4 * torch.randn(self.blocks, self.blocks, self.blocks))}

    def count_shared(self, sites: Sequence[Site]) -> int:
        return self.blocks**3

    def init(self, site: Site) -> dict[str, Any]:
        n = site.out_features
        if n % self.blocks:
            raise UserError(
                f"Compacter: {site.name} is {n} wide, which blocks={self.blocks} does not divide",
                fix=f"blocks={math.gcd(n, self.bottleneck)}",
            )
        return {
            "down": self.factors(n, self.bottleneck) | {"b": nn.Parameter(torch.zeros(self.bottleneck))},
            "up": self.factors(self.bottleneck, n) | {"b": nn.Parameter(torch.zeros(n))},
        }

    def factors(self, into: int, out: int) -> dict[str, Any]:
        """S and T of one matrix, each slice drawn for a gain of √2."""
        shapes = {"S": (into // self.blocks, self.rank), "T": (self.rank, out // self.blocks)}
        return {
            name: nn.Parameter(torch.empty(self.blocks, *shape).uniform_(-1, 1) * math.sqrt(12 / sum(shape)))
            for name, shape in shapes.items()
        }

    def count(self, site: Site) -> int:
        n, m = site.out_features, self.bottleneck
        return 2 * self.rank * (n + m) + n + m

    def matrix(self, A: Tensor, p: Any) -> Tensor:
        """Σ_i A_i ⊗ S_i T_i (in, out): entry (a, c) of A_i times the whole of S_i T_i stands at block (a, c)."""
        return torch.einsum("iac,ibe->abce", A, p.S @ p.T).flatten(2).flatten(0, 1)

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        h, A = base(x), p.shared.A
        inner = F.gelu(h @ self.matrix(A, p.down) + p.down.b)
        return h + inner @ self.matrix(A, p.up) + p.up.b
