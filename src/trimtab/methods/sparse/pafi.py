"""PaFi: train the weights that pretraining left smallest; the same ones for every task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.core.mask import Ranked
from trimtab.core.site import Site


@dataclass(frozen=True)
class PaFi(Ranked):
    """W' = W + Σ_i v_i at the `density` share of entries with the smallest |W|, over all sites.

    `index` (k) holds flat positions of W, `value` (k) their trained offsets, 0 at the start. No data is needed, and all
    tasks on one model share one mask. Entries that are exactly 0 (padding, pruned ones) are never chosen, so a pruned
    weight keeps its zeros. Costs 2k multiplications per token, k values, gradients and states. Mergeable.
    arXiv 2305.16742. There is no official code. The sites are those of `where`: embeddings, norms and biases are left
    out by default. The mask follows from W, but is stored beside the values, so that a file says what it edits.
    """

    paper: ClassVar[str] = "2305.16742"
    learning_rate: ClassVar[float] = 4e-3
    """Ten times that of masks by gradients, which hold the entries that little is enough for."""

    def score(self, site: Site) -> Tensor:
        W = site.base.weight.detach()
        return W.abs().neg().masked_fill(W == 0, -torch.inf)
