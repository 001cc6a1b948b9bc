"""FISH-DIP: a Fisher mask that is drawn anew during training, from the examples that are still hard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.mask import Ranked, largest, shares
from trimtab.core.site import Base, Site
from trimtab.core.sparse import sparse_linear


@dataclass(frozen=True)
class FishDIP(Ranked):
    """W' = W + Σ_i v_i + Σ_j u_j: v trains where F = Σ_n (∂loss_n/∂W')² is largest, u is left over from earlier masks.

    F is summed over the hardest examples only, at the start and every `every` steps (`trimtab.hardest_fisher`); each
    time the `density` share of entries with the largest F over all sites becomes the new mask, one entry per site at
    least. `index` (k) and `value` (k) are the mask and its offsets, 0 at the start; `kept_index` and `kept_value`
    (none at the start) hold what entries no longer trained have moved, so the sum of all masks is what is stored.
    Costs 2k multiplications per token, more with every mask, and one pass over some examples per mask. Mergeable.
    EMNLP 2023, arXiv 2311.03748. The official code keeps the optimizer's moments of entries that leave the mask; here
    `stale` drops them all, and Adam takes the place of its Adafactor.
    """

    paper: ClassVar[str] = "2311.03748"
    elastic: ClassVar[frozenset[str]] = frozenset({"index", "value", "kept_index", "kept_value"})
    statistics: ClassVar[str | None] = "hardest_fisher"

    density: float = 0.01
    every: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise UserError(f"FishDIP: every={self.every!r}", fix="every of 1 step or more")

    def score(self, site: Site) -> Tensor:
        return site.statistics["hardest_fisher"]

    def shared(self, sites: Any) -> dict[str, Any]:
        """`keep` (sites): how many entries each site gets; never none, so that every site can gain some later."""
        return {"keep": shares([self.scored(site) for site in sites], self.density, least=1)}

    def init(self, site: Site) -> dict[str, Any]:
        return super().init(site) | {"kept_index": torch.zeros(0, dtype=torch.long), "kept_value": torch.zeros(0)}

    def whole(self, p: Any) -> tuple[Tensor, Tensor]:
        """Places and offsets of everything that was ever trained."""
        return torch.cat([p.index, p.kept_index]), torch.cat([p.value, p.kept_value])

    def weight(self, W: Tensor, p: Any) -> Tensor:
        index, value = self.whole(p)
        return W.flatten().index_add(0, index, value.to(W.dtype)).view_as(W)

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        index, value = self.whole(p)
        return base(x) + sparse_linear(x, value, index, base.shape)

    def due(self, step: int | None) -> bool:
        return step is not None and step % self.every == 0

    def stale(self, p: Any, step: int) -> list[Tensor]:
        return [p.value] if self.due(step) else []

    @torch.no_grad()
    def settle(self, sites: Mapping[str, Any], statistics: Mapping[str, Tensor], step: int | None) -> None:
        """Move the mask of every site to where F is largest now."""
        scores = [statistics[name].flatten() for name in sites]
        for p, F, keep in zip(sites.values(), scores, shares(scores, self.density, least=1).tolist(), strict=True):
            chosen = largest(F, keep).to(p.index.device)
            index, value = self.whole(p)
            order = index.argsort()
            at = torch.searchsorted(index[order], chosen).clamp(max=len(index) - 1)
            known = index[order][at] == chosen
            left = ~torch.isin(index, chosen) & (value != 0)
            p.kept_index, p.kept_value = index[left], value[left].clone()
            p.index = chosen
            p.value.data = torch.where(known, value[order][at], 0.0)
            p.value.grad = None
