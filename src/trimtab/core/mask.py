"""Sparse offsets of a weight: what all methods that train a few of its entries have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import WeightMethod
from trimtab.core.site import Base, Site
from trimtab.core.sparse import sparse_linear


@dataclass(frozen=True)
class Sparse(WeightMethod):
    """Abstract: W' = W + Σ_i v_i at the flat places `index` (k) of W, v = `value` (k); no dense matrix or gradient."""

    learning_rate: ClassVar[float] = 4e-4
    width_power: ClassVar[float] = 1.0

    def weight(self, W: Tensor, p: Any) -> Tensor:
        return W.flatten().index_add(0, p.index, p.value.to(W.dtype)).view_as(W)

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        return base(x) + sparse_linear(x, p.value, p.index, base.shape)


@dataclass(frozen=True)
class Ranked(Sparse):
    """Abstract: the places are the `density` share of all entries with the highest score, ranked over all sites."""

    elastic: ClassVar[frozenset[str]] = frozenset({"index", "value"})

    density: float = 0.005

    def __post_init__(self) -> None:
        check_density(self, self.density)

    @abstractmethod
    def score(self, site: Site) -> Tensor:
        """How much an entry of W is wanted (out, in), -inf where it may not be chosen."""

    def scored(self, site: Site) -> Tensor:
        """The scores of a site in one row; on the meta device only their number matters."""
        W = site.base.weight
        return W.flatten() if W.is_meta else self.score(site).flatten()

    def shared(self, sites: Sequence[Site]) -> dict[str, Any]:
        """`keep` (sites): how many entries each site gets from one ranking over all of them."""
        return {"keep": shares([self.scored(site) for site in sites], self.density)}

    def init(self, site: Site) -> dict[str, Any]:
        scores = self.scored(site)
        keep = self.count(site) if scores.is_meta else int(site.shared.keep[site.index])
        value = torch.zeros(keep)
        return {"index": largest(scores, keep), "value": nn.Parameter(value) if keep else value}

    def count(self, site: Site) -> int:
        """The site's share of the budget if all sites were alike; the ranking moves it between them."""
        return share(self.density, site)


def check_density(method: WeightMethod, density: float) -> None:
    """Refuse a share of entries that is not one."""
    if not 0 < density <= 1:
        raise UserError(f"{type(method).__name__}: density={density!r} is not a share", fix="above 0, at most 1")


def share(density: float, site: Site) -> int:
    """A share of the entries of a site, one at least."""
    return max(1, int(density * site.out_features * site.in_features))


def shares(scores: Sequence[Tensor], density: float, least: int = 0) -> Tensor:
    """How many of the `density` share of all entries with the highest scores lie in each of these rows of scores.

    Each row gets at least `least`; entries that score -inf are never counted.
    """
    if scores[0].is_meta:
        return torch.zeros(len(scores), dtype=torch.long)
    budget = max(1, int(density * sum(len(row) for row in scores)))
    best = [torch.topk(row, min(budget, len(row))).values for row in scores]
    firsts = torch.tensor([min(least, len(row)) for row in best])
    rest = [row[first:] for row, first in zip(best, firsts.tolist(), strict=True)]
    owner = torch.cat([torch.full((len(row),), n) for n, row in enumerate(rest)])
    flat = torch.cat(rest).cpu()
    left = min(max(0, budget - int(firsts.sum())), int((flat > -torch.inf).sum()))
    return firsts + torch.bincount(owner[torch.topk(flat, left).indices], minlength=len(best))


def largest(scores: Tensor, keep: int) -> Tensor:
    """Flat places of the `keep` highest scores, in order."""
    return torch.topk(scores, keep).indices.sort().values
