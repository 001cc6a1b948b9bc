"""LoRA-GA: start where the first step of LoRA is close to that of full fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trimtab.core.errors import UserError, listing
from trimtab.core.site import Site
from trimtab.core.spectrum import triplets
from trimtab.core.start import Factors, Start

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr")


@dataclass(frozen=True)
class LoRAGA(Start):
    """A = κ V_1ᵀ, B = κ U_2 of the gradient G = ∂loss/∂W = U S Vᵀ, κ = out^¼ / √γ; W0 = W − s·B A stays frozen.

    A (rank, in) holds the right singular vectors 1..r and B (out, rank) the left ones r+1..2r, so that the first change
    of B A is the best approximation of rank 2r of a step along G. `directions` may turn the two around (`A2rBr`) or
    take every other one (`ArBr`). G is measured first (`trimtab.gradient`), on some training rows of the dense model.
    Costs one backward pass with all gradients and one SVD per matrix; twice LoRA's multiplications until it is merged.
    arXiv 2407.05000, whose code uses γ = 16 and ArB2r. PEFT multiplies B by singular values and leaves A unscaled; here
    both factors are as in the paper and its code.
    """

    paper: ClassVar[str] = "2407.05000"
    statistics: ClassVar[str | None] = "gradient"

    gamma: float = 16.0
    directions: str = "ArB2r"

    def __post_init__(self) -> None:
        if self.gamma <= 0 or self.directions not in DIRECTIONS:
            raise UserError(
                f"LoRAGA: gamma={self.gamma!r}, directions={self.directions!r}",
                fix=f"gamma above 0, directions one of {listing(DIRECTIONS)}",
            )

    def factors(self, site: Site, rank: int, scale: float) -> Factors:
        G = site.statistics["gradient"].to(site.base.weight.device)
        if 2 * rank > min(G.shape):
            raise UserError(
                f"LoRAGA: rank={rank} takes {2 * rank} directions, and {site.name} is {G.shape[0]} x {G.shape[1]}",
                fix=f"a rank of {min(G.shape) // 2} or less",
            )
        U, _, Vt = triplets(G)
        first, second = {
            "ArB2r": (slice(0, rank), slice(rank, 2 * rank)),
            "A2rBr": (slice(rank, 2 * rank), slice(0, rank)),
            "ArBr": (slice(1, 2 * rank, 2), slice(0, 2 * rank, 2)),
        }[self.directions]
        kappa = G.shape[0] ** 0.25 / self.gamma**0.5
        return Factors(kappa * Vt[first], kappa * U[:, second])
