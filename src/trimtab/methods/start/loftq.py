"""LoftQ: start a LoRA from what quantizing the weight loses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from trimtab.core.site import Site
from trimtab.core.spectrum import largest
from trimtab.core.start import Factors, Start, balanced, wide_weight


@dataclass(frozen=True)
class LoftQ(Start):
    """min ‖W − Q − s·B A‖ by turns: Q = q(W − s·B A), then s·B A = the r largest singular triplets of W − Q.

    Begins with B A = 0 and ends, after `rounds`, on A (rank, in) = √(S/s) Vᵀ and B (out, rank) = U √(S/s). The frozen
    weight is q(W − s·B0 A0) with the product of the round before the last one. Only for a weight that is about to be
    quantized, in any format.
    Costs `rounds` SVDs per matrix; in training twice LoRA's multiplications per token.
    arXiv 2310.08659. The official code leaves s out, so that with its alpha and rank only a part of the correction
    acts; here s·B A is the whole of it.
    """

    paper: ClassVar[str] = "2310.08659"
    needs_format: ClassVar[bool] = True

    rounds: int = 5
    iterations: int | None = 4

    def factors(self, site: Site, rank: int, scale: float) -> Factors:
        W = wide_weight(site)
        A, B = torch.zeros(rank, W.shape[1]).to(W), torch.zeros(W.shape[0], rank).to(W)
        for _ in range(self.rounds):
            A0, B0 = A, B
            left = W - site.stored(W - scale * B @ A)
            A, B, _, _ = balanced(*largest(left, rank, self.iterations), scale)
        return Factors(A, B, A0, B0)
