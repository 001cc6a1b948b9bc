"""RandLoRA: an update of full rank out of frozen random low-rank bases and trained diagonals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.low_rank import LowRank
from trimtab.core.site import Site


@dataclass(frozen=True)
class RandLoRA(LowRank):
    """W' = W + s·Σ_j B_j diag(λ_j) A diag(γ_j), j = 1 … n with n = ⌈min(in, out) / rank⌉ and s = alpha / rank.

    A (rank, in) and B_j (out, rank), uniform of deviation 1, are frozen and shared by all sites, each taking leading
    rows and columns. λ (n, rank), which starts at 0, and γ (n, in), at 1/max(n, in), are trained. A site with in > out
    uses the same bases transposed, so that A and γ are on its shorter side. A larger rank means fewer trained values.
    Costs 2·min(in, out)·(in + out) multiplications per token and builds bases of the weight's size in every step;
    nothing after merging. Mergeable.
    arXiv 2502.00987. PEFT numbers the columns of B base by base and the rows of A row by row, and so pairs
    them in another way than the equation does.
    """

    paper: ClassVar[str] = "2502.00987"
    learning_rate: ClassVar[float] = 1e-3
    laws: ClassVar[Mapping[str, str]] = {"cost": "bases of full rank have the weight's size together"}

    rank: int = 32
    alpha: float = 640.0
    dropout: float = 0.0

    def shared(self, sites: Sequence[Site]) -> dict[str, Any]:
        short = max(min(site.base.shape) for site in sites)
        long = max(max(site.base.shape) for site in sites)
        A = torch.empty(self.rank, short).uniform_(-(3**0.5), 3**0.5)
        B = torch.empty(self.bases(short), long, self.rank).uniform_(-(3**0.5), 3**0.5)
        return {"A": A, "B": B}

    def bases(self, short: int) -> int:
        """n for a site whose shorter side is this."""
        return -(-short // self.rank)

    def init(self, site: Site) -> dict[str, Any]:
        short = min(site.base.shape)
        n = self.bases(short)
        gamma = torch.full((n, short), 1.0 / max(n, short))
        return {"lambda_": nn.Parameter(torch.zeros(n, self.rank)), "gamma": nn.Parameter(gamma)}

    def count(self, site: Site) -> int:
        short = min(site.out_features, site.in_features)
        return self.bases(short) * (self.rank + short)

    def factors(self, p: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        short, long = min(shape), max(shape)
        n = self.bases(short)
        scaled = p.lambda_[:, :, None] * p.shared.A[:, :short] * p.gamma[:, None, :]  # (n, rank, short)
        A = scaled.flatten(0, 1)  # (n·rank, short)
        B = (self.alpha / self.rank) * p.shared.B[:n, :long].movedim(1, 0).flatten(1)  # (long, n·rank)
        return (A.mT, B.mT) if shape[1] > shape[0] else (B, A)
