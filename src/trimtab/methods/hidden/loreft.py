"""LoReFT: an edit of the residual stream inside a low-rank orthonormal subspace, at chosen prompt positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.positions import PromptEdit
from trimtab.core.site import Site
from trimtab.core.spectrum import orthonormal


@dataclass(frozen=True)
class LoReFT(PromptEdit):
    """h ← h + Rᵀ(W h + b − R h) at the first `first` and last `last` tokens of the prompt, after every block.

    R (rank, width) has orthonormal rows: the Q factor of the trained M, which starts orthogonal. W (rank, width) and b
    (rank) start as a linear layer's. With n prompt tokens at most ⌊n/2⌋ first and ⌈n/2⌉ last ones are edited;
    generated tokens never are. Costs 4·rank·width multiplications per token in prefill, none in decoding. Not
    mergeable.
    arXiv 2404.03592. First and last tokens share their tensors; `Untied(inner=LoReFT())` gives each its own. The
    official code drops out the whole output and prepends a pad token; neither is done here.
    """

    paper: ClassVar[str] = "2404.03592"

    def init(self, site: Site) -> dict[str, Any]:
        source = nn.Linear(site.out_features, self.rank)
        M = nn.init.orthogonal_(torch.empty(self.rank, site.out_features))
        return {"M": nn.Parameter(M), "W": source.weight, "b": source.bias}

    def count(self, site: Site) -> int:
        return 2 * self.rank * site.out_features + self.rank

    def edit(self, h: Tensor, p: Any) -> Tensor:
        R = orthonormal(p.M)
        return (F.linear(h, p.W, p.b) - F.linear(h, R)) @ R
