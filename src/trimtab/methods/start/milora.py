"""MiLoRA: train the minor part of the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trimtab.core.site import Site
from trimtab.core.spectrum import triplets
from trimtab.core.start import Factors, Start, balanced, wide_weight


@dataclass(frozen=True)
class MiLoRA(Start):
    """s·B A = U_m S_m V_mᵀ, the r smallest singular triplets of W = U S Vᵀ, and W0 = W − s·B A stays frozen.

    A (rank, in) = √(S_m/s) V_mᵀ and B (out, rank) = U_m √(S_m/s): what the pretrained weight uses least is retrained,
    its principal part stays.
    Costs one whole SVD per matrix, and twice LoRA's multiplications per token until it is merged.
    arXiv 2406.09044. A and B are small; here W keeps its bits, so rounding in a narrow type cannot erase W − s·B A.
    """

    paper: ClassVar[str] = "2406.09044"

    def factors(self, site: Site, rank: int, scale: float) -> Factors:
        U, S, Vt = triplets(wide_weight(site))
        return balanced(U[:, -rank:], S[-rank:], Vt[-rank:], scale)
