"""BOFT: a dense rotation of the input as a product of sparse ones, the butterflies of the Fourier transform."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.blocks import cayley, require_blocks, rotate
from trimtab.core.errors import UserError
from trimtab.core.method import WeightMethod
from trimtab.core.site import Base, Site


@dataclass(frozen=True)
class BOFT(WeightMethod):
    """W' = diag(s) W Rᵀ with R = G_m … G₁ and G_i = P_i diag(R_i1 … R_in) P_iᵀ: y = s ∘ (W (Rᵀ x)) + b.

    P_i brings half blocks 2^(i−1) apart together, so that after log₂(in / block_size) + 1 factors every input meets
    every other. R_ij = (I − S)(I + S)⁻¹, S = ½(D − Dᵀ), where D (factors, in / block_size, block_size, block_size)
    starts at 0 and s (out) at 1. Costs factors·block_size·in multiplications per token; nothing after merging.
    Mergeable.
    arXiv 2311.06243. As in the official code D is stored whole and s does not scale the bias; PEFT uses a single factor
    where its CUDA extension is missing, whatever it is asked for.
    """

    paper: ClassVar[str] = "2311.06243"
    learning_rate: ClassVar[float] = 2e-3
    width_power: ClassVar[float] = 0.5

    block_size: int = 8
    factors: int = 2

    def __post_init__(self) -> None:
        if self.block_size < 2 or self.block_size % 2 or self.factors < 1:
            raise UserError(
                f"BOFT: block_size={self.block_size}, factors={self.factors}",
                fix="an even block_size and at least one factor, such as 8 and 2",
            )

    def init(self, site: Site) -> dict[str, Any]:
        b = self.block_size
        require_blocks("BOFT", site, b * 2 ** (self.factors - 1), site.in_features)
        D = torch.zeros(self.factors, site.in_features // b, b, b)
        return {"D": nn.Parameter(D), "s": nn.Parameter(torch.ones(site.out_features))}

    def count(self, site: Site) -> int:
        return self.factors * site.in_features * self.block_size + site.out_features

    def factor(self, x: Tensor, R: Tensor, index: int) -> Tensor:
        """x P diag(R) Pᵀ: within runs of 2^index blocks, half blocks 2^index apart meet in one rotation."""
        if index == 0:
            return rotate(x, R)
        half, runs = self.block_size // 2, x.shape[-1] // (self.block_size * 2**index)
        together = x.unflatten(-1, (runs, 2, 2**index, half)).transpose(-3, -2)
        turned = rotate(together.flatten(-4), R).unflatten(-1, (runs, 2**index, 2, half))
        return turned.transpose(-3, -2).flatten(-4)

    def turned(self, x: Tensor, p: Any) -> Tensor:
        """x R, the last factor first."""
        rotations = cayley(0.5 * (p.D.mT - p.D))
        for index in reversed(range(self.factors)):
            x = self.factor(x, rotations[index], index)
        return x

    def weight(self, W: Tensor, p: Any) -> Tensor:
        rotations = cayley(0.5 * (p.D.mT - p.D)).mT
        for index in range(self.factors):
            W = self.factor(W, rotations[index], index)
        return p.s[:, None] * W

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        y = p.s * base.matmul(self.turned(x, p))
        return y if base.bias is None else y + base.bias

    def row_norm(self, base: Base, p: Any) -> Tensor:
        """A rotation of the input keeps them, s scales them."""
        return p.s.detach().abs() * torch.linalg.vector_norm(base.weight, dim=1)
