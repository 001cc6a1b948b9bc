"""EVA: start reading the directions in which a layer's inputs vary most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.site import Site
from trimtab.core.spectrum import oriented
from trimtab.core.start import Factors, Start


@dataclass(frozen=True)
class EVA(Start):
    """A = V_rᵀ, B = 0: the r first right singular vectors of the layer's inputs X = U S Vᵀ, tokens by inputs.

    A (rank, in) is orthonormal, B (out, rank) zero; W is left whole. V and S come from C = XᵀX / tokens, measured first
    on some training rows (`trimtab.covariance`). `spread` above 1 gives the ranks out over all sites, by the share of
    variance S_k² / ΣS² that a direction explains: spread·rank at most, one at least, `rank` in the mean. `whiten`
    divides each row of A by S_k.
    Costs one forward pass over some rows and one eigendecomposition per layer input; in training what LoRA costs.
    arXiv 2410.07170. The official code runs an incremental SVD that keeps r·spread directions and stops when they no
    longer turn; C is its limit, at the memory of in² values per layer input. A site without a rank is left out there.
    """

    paper: ClassVar[str] = "2410.07170"
    statistics: ClassVar[str | None] = "covariance"
    takes_out: ClassVar[bool] = False
    laws: ClassVar[Mapping[str, str]] = {"deterministic": "sites with the same input start from the same A"}

    spread: float = 1.0
    whiten: bool = False

    def __post_init__(self) -> None:
        if self.spread < 1:
            raise UserError(f"EVA: spread={self.spread!r}", fix="1 (every site gets the same rank) or more, as 2")

    @property
    def elastic(self) -> bool:
        return self.spread > 1

    def factors(self, site: Site, rank: int, scale: float) -> Factors:
        variance, Vt = principal(site.statistics["covariance"])
        if rank > len(Vt):
            raise UserError(f"EVA: rank={rank} at {site.name}, which has {len(Vt)} inputs", fix="a smaller rank")
        A = Vt[:rank] / variance[:rank, None].sqrt() if self.whiten else Vt[:rank]
        return Factors(A, torch.zeros(site.out_features, rank))

    def budget(self, sites: Sequence[Site], rank: int) -> Tensor | None:
        if not self.elastic:
            return None
        if torch.empty(0).is_meta:
            return torch.empty(len(sites), dtype=torch.long)
        most = int(self.spread * rank)
        shares = []
        for site in sites:
            variance = torch.linalg.eigvalsh(site.statistics["covariance"].double()).flip(0).clamp(min=0)
            shares.append((variance / variance.sum())[: min(most, *site.base.shape)])
        owner = torch.cat([torch.full((len(one) - 1,), n) for n, one in enumerate(shares)])
        left = rank * len(sites) - len(sites)
        best = torch.cat([one[1:] for one in shares]).topk(min(left, len(owner))).indices
        return 1 + torch.bincount(owner[best], minlength=len(sites))


def principal(C: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (in) and eigenvectors (in, in) as rows of a symmetric matrix, largest first."""
    values, vectors = torch.linalg.eigh(C.double())
    values, Vt = values.flip(0).clamp(min=1e-30), vectors.flip(1).mT
    return values.to(C.dtype), oriented(Vt.mT, values, Vt)[2].to(C.dtype)
