"""SVFT: a sparse matrix of trained values between the singular vectors of the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import WeightMethod
from trimtab.core.site import Base, Site
from trimtab.core.sparse import sparse_linear

PATTERNS = ("plain", "banded", "random", "top")


@dataclass(frozen=True)
class SVFT(WeightMethod):
    """W' = U (Σ + M) Vᵀ, with W = U Σ Vᵀ and M sparse: `plain` its diagonal, `banded` |i − j| ≤ width, `random` and
    `top` as many entries as banded, drawn evenly or where u_iᵀ v_j is largest.

    U (out, n) and V (in, n), n = min(in, out), are computed once, fixed, and part of the file; the entries m of M = 0
    are trained at the fixed flat places `index`. Costs 2·n·(in + out) multiplications per token; nothing after merging.
    Mergeable.
    arXiv 2405.19597. The official code draws M and gates it, so starts off W; zero is exactly W. `top` ranks UᵀV as in
    the paper, where the code takes U V; on a weight that is not square the shorter of u and v is filled with zeros.
    """

    paper: ClassVar[str] = "2405.19597"
    learning_rate: ClassVar[float] = 5e-3

    pattern: str = "banded"
    width: int = 4

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS or self.width < 0:
            raise UserError(
                f"SVFT: pattern={self.pattern!r}, width={self.width}", fix=f"one of {', '.join(PATTERNS)}; width 0 up"
            )

    def init(self, site: Site) -> dict[str, Any]:
        n, W = min(site.out_features, site.in_features), site.base.weight
        m = nn.Parameter(torch.zeros(self.count(site)))
        if W.is_meta:
            U, V = torch.empty(site.out_features, n), torch.empty(site.in_features, n)
            return {"U": U, "V": V, "index": torch.empty(len(m), dtype=torch.long), "m": m}
        U, _, Vt = torch.linalg.svd(W.detach().float().cpu(), full_matrices=False)
        return {"U": U, "V": Vt.mT.contiguous(), "index": self.index(U, Vt.mT), "m": m}

    def index(self, U: Tensor, V: Tensor) -> Tensor:
        """Flat places of the trained entries in M (n, n), in order."""
        n = U.shape[1]
        away = (torch.arange(n)[:, None] - torch.arange(n)).abs()
        band = away <= (0 if self.pattern == "plain" else self.width)
        if self.pattern in ("plain", "banded"):
            return band.flatten().nonzero().squeeze(1)
        size = int(band.sum())
        if self.pattern == "random":
            return torch.randperm(n * n)[:size].sort().values
        shorter = min(len(U), len(V))
        return (U[:shorter].mT @ V[:shorter]).flatten().topk(size).indices.sort().values

    def count(self, site: Site) -> int:
        n = min(site.out_features, site.in_features)
        d = 0 if self.pattern == "plain" else min(self.width, n - 1)
        return n * (2 * d + 1) - d * (d + 1)

    def weight(self, W: Tensor, p: Any) -> Tensor:
        n = p.U.shape[-1]
        M = p.m.new_zeros(n * n).index_copy(0, p.index, p.m).view(n, n)
        return W + p.U @ M @ p.V.mT

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        n = p.U.shape[-1]
        return base(x) + sparse_linear(base.affine(x, p.V.mT), p.m, p.index, (n, n)) @ p.U.mT
