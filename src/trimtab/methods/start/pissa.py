"""PiSSA: train the principal part of the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trimtab.core.site import Site
from trimtab.core.spectrum import largest
from trimtab.core.start import Factors, Start, balanced, wide_weight


@dataclass(frozen=True)
class PiSSA(Start):
    """s·B A = U_r S_r V_rᵀ, the r largest singular triplets of W = U S Vᵀ, and W0 = W − s·B A stays frozen.

    A (rank, in) = √(S_r/s) V_rᵀ and B (out, rank) = U_r √(S_r/s), by so many `iterations` of subspace iteration (the
    paper's fast SVD) or, with None, by the whole decomposition. On a weight that is about to be quantized, `rounds`
    repeat (QPiSSA): the largest triplets of W − Q, then Q = q(W − s·B A); each round lowers what quantizing loses.
    Costs one decomposition per matrix, and twice LoRA's multiplications per token until it is merged.
    arXiv 2404.02948. Dropout is on the change s·(B A − B0 A0) x here, not on the principal part itself.
    """

    paper: ClassVar[str] = "2404.02948"

    iterations: int | None = 8
    rounds: int = 5

    def factors(self, site: Site, rank: int, scale: float) -> Factors:
        W = wide_weight(site)
        found = balanced(*largest(W, rank, self.iterations), scale)
        for _ in range(self.rounds - 1 if site.format is not None else 0):
            Q = site.stored(W - scale * found.B @ found.A)
            found = balanced(*largest(W - Q, rank, self.iterations), scale)
        return found
