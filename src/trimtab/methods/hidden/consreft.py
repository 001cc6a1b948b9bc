"""ConsReFT: the residual stream is set to a constant inside a low-rank subspace, at chosen prompt positions."""

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
class ConsReFT(PromptEdit):
    """h ← h + Rᵀ(b − R h) at the first `first` and last `last` tokens of the prompt, after every block.

    What h was in the subspace is replaced by b. R (rank, width) has orthonormal rows: the Q factor of the trained M,
    which starts orthogonal; b (rank) ~ U(0, 1). With n prompt tokens at most ⌊n/2⌋ first and ⌈n/2⌉ last ones are
    edited; generated tokens never are. Costs 2·rank·width multiplications per token in prefill, none in decoding. Not
    mergeable.
    arXiv 2404.03592, ablation in the appendix. The official code prepends a pad token; this is not done here.
    """

    paper: ClassVar[str] = "2404.03592"

    def init(self, site: Site) -> dict[str, Any]:
        M = nn.init.orthogonal_(torch.empty(self.rank, site.out_features))
        return {"M": nn.Parameter(M), "b": nn.Parameter(torch.rand(self.rank))}

    def count(self, site: Site) -> int:
        return self.rank * site.out_features + self.rank

    def edit(self, h: Tensor, p: Any) -> Tensor:
        R = orthonormal(p.M)
        return (p.b - F.linear(h, R)) @ R
