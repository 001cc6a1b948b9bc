"""FishMask: train only the weights with the largest Fisher information."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.method import WeightMethod
from trimtab.core.site import Base, Site
from trimtab.core.sparse import sparse_linear


@dataclass(frozen=True)
class FishMask(WeightMethod):
    """W' = W + Σ_i v_i at the `density` share of entries with the largest F = Σ_n (∂loss_n/∂W)², over all sites.

    `index` (k) holds flat positions of W, `value` (k) their trained offsets, 0 at the start. F is measured once, before
    training, one example at a time (`trimtab.fisher`). Costs 2k multiplications per token, k values, gradients and
    optimizer states; no mask and no dense gradient is kept. Mergeable.
    NeurIPS 2021, arXiv 2111.09839. A head trained beside it is a part of its own and outside the budget, as in the
    official code.
    """

    paper: ClassVar[str] = "2111.09839"
    learning_rate: ClassVar[float] = 4e-4
    width_power: ClassVar[float] = 1.0
    elastic: ClassVar[frozenset[str]] = frozenset({"index", "value"})
    statistics: ClassVar[str | None] = "fisher"

    density: float = 0.005

    def shared(self, sites: Sequence[Site]) -> dict[str, Any]:
        """`keep` (sites): how many entries each site gets from one ranking over all of them."""
        scores = [self.score(site).flatten() for site in sites]
        if scores[0].is_meta:
            return {"keep": torch.zeros(len(sites), dtype=torch.long)}
        budget = max(1, int(self.density * sum(len(F) for F in scores)))
        best = [torch.topk(F, min(budget, len(F))).values for F in scores]
        owner = torch.cat([torch.full((len(F),), n) for n, F in enumerate(best)])
        chosen = torch.topk(torch.cat(best), budget).indices
        return {"keep": torch.bincount(owner[chosen], minlength=len(sites))}

    def init(self, site: Site) -> dict[str, Any]:
        F = self.score(site).flatten()
        keep = self.count(site) if F.is_meta else int(site.shared.keep[site.index])
        index = torch.topk(F, keep).indices.sort().values
        value = torch.zeros(keep)
        return {"index": index, "value": nn.Parameter(value) if keep else value}

    def score(self, site: Site) -> Tensor:
        """F of a site; on the meta device only its shape matters."""
        W = site.base.weight
        return W if W.is_meta else site.statistics["fisher"]

    def count(self, site: Site) -> int:
        """The site's share of the budget if all sites were alike; the ranking moves it between them."""
        return max(1, int(self.density * site.out_features * site.in_features))

    def weight(self, W: Tensor, p: Any) -> Tensor:
        return W.flatten().index_add(0, p.index, p.value.to(W.dtype)).view_as(W)

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        return base(x) + sparse_linear(x, p.value, p.index, base.shape)
