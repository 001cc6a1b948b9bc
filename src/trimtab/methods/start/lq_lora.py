"""LQ-LoRA: split a weight into a quantized part and a low-rank part, where its loss is most sensitive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.core.site import Site
from trimtab.core.spectrum import largest
from trimtab.core.start import Factors, Start, balanced, wide_weight


@dataclass(frozen=True)
class LQLoRA(Start):
    """min ‖√F ∘ (W − Q − s·B A)‖ by turns: s·B A = SVD_r of W − Q under the weights F, then Q = q(W − s·B A).

    F (out, in) is the Fisher information of W, measured first (`trimtab.fisher`). With D_r² its row means and D_c² its
    column means, D_r (W − Q) D_c = U S Vᵀ gives B (out, rank) = D_r⁻¹ U √(S/s) and A (rank, in) = √(S/s) Vᵀ D_c⁻¹. It
    begins with Q = 0 and stops when the error rises, after `rounds` at the latest; the best pair is kept. Only for a
    weight that is about to be quantized.
    Costs one backward pass per row measured and up to `rounds` SVDs per matrix; twice LoRA's multiplications per token.
    arXiv 2311.12023. The official code returns the last pair, which is a little worse than the best.
    """

    paper: ClassVar[str] = "2311.12023"
    statistics: ClassVar[str | None] = "fisher"
    needs_format: ClassVar[bool] = True

    rounds: int = 10
    iterations: int | None = 4

    def factors(self, site: Site, rank: int, scale: float) -> Factors:
        W = wide_weight(site)
        F = site.statistics["fisher"].to(W)
        rows, columns = sensitivity(F.mean(1)), sensitivity(F.mean(0))
        lowest, Q = float("inf"), torch.zeros_like(W)
        for _ in range(self.rounds):
            A, B, _, _ = balanced(*largest(rows[:, None] * (W - Q) * columns, rank, self.iterations), scale)
            A, B = A / columns, B / rows[:, None]
            Q = site.stored(W - scale * B @ A)
            error = float(torch.linalg.vector_norm(F.sqrt() * (W - Q - scale * B @ A)))
            if error >= lowest:
                break
            lowest, found = error, Factors(A, B)
        return found


def sensitivity(mean: Tensor) -> Tensor:
    """√ of mean Fisher values relative to their own mean; rows or columns that never mattered count a thousandth."""
    root = (mean / mean.mean().clamp(min=torch.finfo(mean.dtype).tiny)).sqrt()
    return root.clamp(min=1e-3)
