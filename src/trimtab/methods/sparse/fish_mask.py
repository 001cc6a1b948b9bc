"""FishMask: train only the weights with the largest Fisher information."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trimtab.core.mask import Ranked
from trimtab.core.site import Site


@dataclass(frozen=True)
class FishMask(Ranked):
    """W' = W + Σ_i v_i at the `density` share of entries with the largest F = Σ_n (∂loss_n/∂W)², over all sites.

    `index` (k) holds flat positions of W, `value` (k) their trained offsets, 0 at the start. F is measured once, before
    training, one example at a time (`trimtab.fisher`). Costs 2k multiplications per token, k values, gradients and
    optimizer states; no mask and no dense gradient is kept. Mergeable.
    NeurIPS 2021, arXiv 2111.09839. A head trained beside it is a part of its own and outside the budget, as in the
    official code.
    """

    paper: ClassVar[str] = "2111.09839"
    statistics: ClassVar[str | None] = "fisher"

    def score(self, site: Site) -> Tensor:
        return site.statistics["fisher"]
