"""Gradient mask: in every output channel, train the inputs on which the loss depends most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.mask import Sparse, check_density
from trimtab.core.site import Site


@dataclass(frozen=True)
class GradientMask(Sparse):
    """W' = W + Σ_i v_i at the `density` share of entries of each output row with the largest |G|, G = Σ_n ∂loss_n/∂W.

    `index` (k) holds flat positions of W, `value` (k) their trained offsets, 0 at the start; k = out·⌊density·in⌋, one
    input per row at least. Unlike a ranking over all sites this trains a little everywhere. Costs 2k multiplications
    per token, k values, gradients and states. Mergeable.
    GPS, CVPR 2024, arXiv 2312.10136. There G is that of a contrastive loss without a head; here it is the loss of the
    task (`trimtab.gradient`).
    """

    paper: ClassVar[str] = "2312.10136"
    statistics: ClassVar[str | None] = "gradient"

    density: float = 0.005

    def __post_init__(self) -> None:
        check_density(self, self.density)

    def init(self, site: Site) -> dict[str, Any]:
        return {"index": self.index(site), "value": nn.Parameter(torch.zeros(self.count(site)))}

    def index(self, site: Site) -> Tensor:
        """Flat places of the trained entries, in order."""
        (out, into), keep = site.base.shape, self.per_row(site)
        if site.base.weight.is_meta:
            return torch.empty(out * keep, dtype=torch.long)
        columns = site.statistics["gradient"].abs().topk(keep, dim=1).indices.cpu().sort(1).values
        return (columns + into * torch.arange(out)[:, None]).flatten()

    def per_row(self, site: Site) -> int:
        return max(1, int(self.density * site.in_features))

    def count(self, site: Site) -> int:
        return site.out_features * self.per_row(site)
