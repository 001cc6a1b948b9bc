"""LobiReFT: a constant vector out of a low-rank subspace is added to the residual stream at chosen prompt positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.positions import PromptEdit
from trimtab.core.site import Site
from trimtab.core.spectrum import orthonormal


@dataclass(frozen=True)
class LobiReFT(PromptEdit):
    """h ← h + Rᵀ b at the first `first` and last `last` tokens of the prompt, after every block.

    R (rank, width) has orthonormal rows: the Q factor of the trained M, which starts orthogonal; b (rank) ~ U(0, 1).
    With n prompt tokens at most ⌊n/2⌋ first and ⌈n/2⌉ last ones are edited; generated tokens never are. Costs one
    addition per channel and edited token, none in decoding. Not mergeable.
    arXiv 2404.03592, ablation in the appendix. The official code drops out the whole output and prepends a pad token;
    neither is done here.
    """

    paper: ClassVar[str] = "2404.03592"
    learning_rate: ClassVar[float] = 2e-2
    """Ten times that of edits that depend on the token: one vector of `rank` numbers for all of them."""

    def init(self, site: Site) -> dict[str, Any]:
        M = nn.init.orthogonal_(torch.empty(self.rank, site.out_features))
        return {"M": nn.Parameter(M), "b": nn.Parameter(torch.rand(self.rank))}

    def count(self, site: Site) -> int:
        return self.rank * site.out_features + self.rank

    def edit(self, h: Tensor, p: Any) -> Tensor:
        return p.b @ orthonormal(p.M)
