"""Random mask: train a few weights that were drawn blindly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from trimtab.core.mask import Sparse, check_density, share
from trimtab.core.site import Site


@dataclass(frozen=True)
class RandomMask(Sparse):
    """W' = W + Σ_i v_i at a `density` share of entries, drawn evenly.

    `index` (k) holds flat positions of W, drawn without replacement from (seed, site name); `value` (k) starts at 0.
    The baseline that every chosen mask has to beat. Costs 2k multiplications per token, k values, gradients and states.
    Mergeable.
    arXiv 2405.02596, which finds that it wants a larger learning rate than other methods, the larger the fewer entries
    train. Every site trains the same share of its entries; the official code draws each one independently.
    """

    paper: ClassVar[str] = "2405.02596"
    learning_rate: ClassVar[float] = 1e-3

    density: float = 0.005

    def __post_init__(self) -> None:
        check_density(self, self.density)

    def init(self, site: Site) -> dict[str, Any]:
        keep = self.count(site)
        index = torch.randperm(site.out_features * site.in_features)[:keep].sort().values
        return {"index": index, "value": nn.Parameter(torch.zeros(keep))}

    def count(self, site: Site) -> int:
        return share(self.density, site)
