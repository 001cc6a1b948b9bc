"""HRA: a chain of reflections in front of the frozen weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import WeightMethod
from trimtab.core.site import Base, Site


@dataclass(frozen=True)
class HRA(WeightMethod):
    """W' = W H₁ H₂ … H_r with H_i = I − 2 u_i u_iᵀ / ‖u_i‖², orthogonal and of rank at most r away from W.

    The columns u_i of U (in, rank) start in pairs of equal random ones, whose reflections cancel; `rank` is even. The
    whole chain is one low-rank product, I − V T Vᵀ with V of unit columns and T⁻¹ = ½ I + the strict upper triangle of
    VᵀV. `orthogonality` λ adds λ‖I − VᵀV‖² per site to the loss. Costs 2·rank·in multiplications per token; nothing
    after merging. Mergeable.
    arXiv 2405.17484. λ is in the paper (0, 1e-5 and 1e-4 are tried) and absent from PEFT.
    """

    paper: ClassVar[str] = "2405.17484"
    learning_rate: ClassVar[float] = 3e-3
    width_power: ClassVar[float] = 0.5

    rank: int = 8
    orthogonality: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 2 or self.rank % 2:
            raise UserError(f"HRA: rank={self.rank} does not pair the reflections", fix="an even rank, such as 8")
        if self.orthogonality < 0:
            raise UserError(f"HRA: orthogonality={self.orthogonality} is negative", fix="0, or 1e-4")

    def init(self, site: Site) -> dict[str, Any]:
        half = nn.init.kaiming_uniform_(torch.empty(site.in_features, self.rank // 2), a=math.sqrt(5))
        return {"U": nn.Parameter(half.repeat_interleave(2, dim=1))}

    def count(self, site: Site) -> int:
        return self.rank * site.in_features

    def chain(self, p: Any) -> tuple[Tensor, Tensor]:
        """V (in, rank) and V T (in, rank): the product of all reflections is I − (V T) Vᵀ."""
        U = p.U.float() if p.U.element_size() < 4 else p.U
        V = U / torch.linalg.vector_norm(U, dim=-2, keepdim=True)
        half = 0.5 * torch.eye(self.rank, dtype=V.dtype, device=V.device)
        VT = torch.linalg.solve_triangular((V.mT @ V).triu(1) + half, V, upper=True, left=False)
        return V.to(p.U.dtype), VT.to(p.U.dtype)

    def weight(self, W: Tensor, p: Any) -> Tensor:
        V, VT = self.chain(p)
        return W - (W @ VT) @ V.mT

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        V, VT = self.chain(p)
        return base(x - (x @ V) @ VT.mT)

    def row_norm(self, base: Base, p: Any) -> Tensor:
        """A rotation of the input keeps them."""
        return torch.linalg.vector_norm(base.weight, dim=1)

    def penalty(self, p: Any) -> Tensor | None:
        if not self.orthogonality:
            return None
        V = p.U / torch.linalg.vector_norm(p.U, dim=-2, keepdim=True)
        apart = V.mT @ V - torch.eye(self.rank, dtype=V.dtype, device=V.device)
        return self.orthogonality * apart.square().sum()
