"""LoRA-XS: a small trained matrix between the frozen singular vectors of the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.low_rank import LowRank
from trimtab.core.site import Site


@dataclass(frozen=True)
class LoRAXS(LowRank):
    """W' = W + s·A R B, with A = U_r Σ_r and B = V_rᵀ of W's truncated SVD, s = alpha / rank.

    A (out, rank) and B (rank, in) are computed once and fixed; R (rank, rank) = 0 is trained. A site costs
    2·rank·(in + rank + out) multiplications per token and rank² trained values, whatever the width; nothing after
    merging. Mergeable.
    arXiv 2405.17604. The paper starts R at N(0, 1e-5²) to be almost the identity; 0 is it exactly and gets the same
    gradient, since A and B are not zero. The SVD is a randomized one with 10 power iterations, as in the official code.
    """

    paper: ClassVar[str] = "2405.17604"
    learning_rate: ClassVar[float] = 2e-3

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0

    def init(self, site: Site) -> dict[str, Any]:
        smallest = min(site.out_features, site.in_features)
        if self.rank > smallest:
            raise UserError(
                f"LoRAXS: rank={self.rank}; {site.name} has no more than {smallest} singular vectors",
                fix=f"rank={smallest} or less",
            )
        R = nn.Parameter(torch.zeros(self.rank, self.rank))
        W = site.base.weight
        if W.is_meta:
            return {"A": torch.empty(site.out_features, self.rank), "B": torch.empty(self.rank, W.shape[1]), "R": R}
        U, S, V = torch.svd_lowrank(W.detach().float().cpu(), min(2 * self.rank + 8, smallest), niter=10)
        A, B = U[:, : self.rank] * S[: self.rank], V[:, : self.rank].mT
        return {"A": A.contiguous(), "B": B.contiguous(), "R": R}

    def count(self, site: Site) -> int:
        return self.rank**2

    def factors(self, p: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return p.A, (self.alpha / self.rank) * p.R @ p.B
