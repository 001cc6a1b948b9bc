"""OLoRA: start from an orthonormal basis of the weight's first columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from trimtab.core.site import Site
from trimtab.core.start import Factors, Start, wide_weight


@dataclass(frozen=True)
class OLoRA(Start):
    """B = Q_r, A = R_r of W = Q R: the first r columns of Q and rows of R; W0 = W − s·B A stays frozen.

    B (out, rank) is orthonormal, A (rank, in) is upper triangular with a diagonal that is not negative. There is no
    pivoting, so the order of the inputs matters: B spans the first r columns of W.
    Costs one QR per matrix, and twice LoRA's multiplications per token until it is merged.
    arXiv 2406.01775. As in the paper A is not divided by s: with s = 1 the product is a part of W itself.
    """

    paper: ClassVar[str] = "2406.01775"

    def factors(self, site: Site, rank: int, scale: float) -> Factors:
        Q, R = torch.linalg.qr(wide_weight(site))
        sign = torch.where(R.diagonal() < 0, -1.0, 1.0).to(R.dtype)[:rank]
        return Factors(sign[:, None] * R[:rank], Q[:, :rank] * sign)
