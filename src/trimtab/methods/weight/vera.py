"""VeRA: one random pair of factors for all sites, and two trained vectors at each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.low_rank import LowRank
from trimtab.core.method import dropout
from trimtab.core.site import Base, Site


@dataclass(frozen=True)
class VeRA(LowRank):
    """W' = W + diag(b) B diag(d) A, with A and B random, frozen and the same at every site.

    A (rank, widest in) ~ U(±√(6/in)) and B (widest out, rank) ~ U(±√(6/rank)); a narrower site takes the leading rows
    and columns. b (out) = 0 and d (rank) = 0.1 are trained. Costs 2·rank·(in + out) multiplications per token, out +
    rank trained values per site; nothing after merging. Mergeable.
    arXiv 2310.11454. No alpha: b has every scale. The leading slice for narrower sites is PEFT's; the paper's sites
    have one shape.
    """

    paper: ClassVar[str] = "2310.11454"
    learning_rate: ClassVar[float] = 1e-2

    rank: int = 256
    dropout: float = 0.0

    def shared(self, sites: Sequence[Site]) -> dict[str, Any]:
        into, out = max(site.in_features for site in sites), max(site.out_features for site in sites)
        A = nn.init.uniform_(torch.empty(self.rank, into), -math.sqrt(6 / into), math.sqrt(6 / into))
        B = nn.init.uniform_(torch.empty(out, self.rank), -math.sqrt(6 / self.rank), math.sqrt(6 / self.rank))
        return {"A": A, "B": B}

    def init(self, site: Site) -> dict[str, Any]:
        b, d = torch.zeros(site.out_features), torch.full((self.rank,), 0.1)
        return {"b": nn.Parameter(b), "d": nn.Parameter(d)}

    def count(self, site: Site) -> int:
        return site.out_features + self.rank

    def factors(self, p: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        A, B = p.shared.A[:, : shape[1]], p.shared.B[: shape[0]]
        return p.b[:, None] * B, p.d[:, None] * A

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        out, into = base.shape
        low = p.d * base.affine(dropout(x, self.dropout, p), p.shared.A[:, :into])
        return base(x) + p.b * (low @ p.shared.B[:out].mT)
