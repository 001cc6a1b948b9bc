"""CorDA: decompose the weight as the inputs of a task see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.site import Site
from trimtab.core.spectrum import triplets
from trimtab.core.start import Factors, Start, balanced, wide_weight


@dataclass(frozen=True)
class CorDA(Start):
    """s·B A = U_r S_r (V_rᵀ C⁻¹) of W C = U S Vᵀ, with C = XᵀX of the layer's inputs; W0 = W − s·B A stays frozen.

    A (rank, in) = √(S/s) VᵀC⁻¹ and B (out, rank) = U √(S/s). `part="largest"` trains the r components that matter most
    for the inputs (instruction-previewed adaptation: measure C on the task's rows), `part="smallest"` the r that matter
    least (knowledge-preserved: measure C on what is to be kept). C is measured first (`trimtab.covariance`) and gets
    `damping` times its mean diagonal, doubled until its inverse is exact to 5%.
    Costs one forward pass over some rows and one SVD per matrix; twice LoRA's multiplications until it is merged.
    arXiv 2406.05223. The official code divides each sample by the largest entry of X first; the paper's C has all
    tokens alike, as here.
    """

    paper: ClassVar[str] = "2406.05223"
    statistics: ClassVar[str | None] = "covariance"

    part: str = "largest"
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.part not in ("largest", "smallest") or self.damping <= 0:
            raise UserError(
                f"CorDA: part={self.part!r}, damping={self.damping!r}", fix='part="largest" or "smallest", damping=0.01'
            )

    def factors(self, site: Site, rank: int, scale: float) -> Factors:
        W = wide_weight(site)
        C, inverse = self.invertible(site.statistics["covariance"].to(W))
        U, S, Vt = triplets(W @ C)
        kept = slice(0, rank) if self.part == "largest" else slice(len(S) - rank, len(S))
        return balanced(U[:, kept], S[kept], Vt[kept] @ inverse, scale)

    def invertible(self, C: Tensor) -> tuple[Tensor, Tensor]:
        """C with enough on its diagonal, and its inverse."""
        eye = torch.eye(len(C), dtype=C.dtype, device=C.device)
        mean, damping = C.diagonal().mean(), self.damping
        while True:
            damped = C + damping * mean * eye
            inverse = torch.linalg.inv(damped)
            if float(torch.dist(damped @ inverse, eye)) < 0.05 or damping > 1e3:
                return damped, inverse
            damping *= 2
