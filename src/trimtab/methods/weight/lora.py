"""LoRA: low-rank adaptation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.method import WeightMethod, dropout
from trimtab.core.site import Base, Site


@dataclass(frozen=True)
class LoRA(WeightMethod):
    """W' = W + s·B A, with s = alpha / rank.

    A (rank, in) reads `rank` directions of the input, B (out, rank) writes them to the output; W stays frozen.
    A ~ U(±1/√in) and B = 0 (`start="A"`), or B random and A = 0 (`start="B"`); an embedding starts from B ~ N(0, 1) and
    A = 0, since its input is one-hot. Dropout is on the branch's input only.
    Costs 2·rank·(in + out) multiplications per token; nothing after merging. Mergeable.
    arXiv 2106.09685; the uniform A is the official code's, the paper says Gaussian. On a fused qkv each slice gets its
    own pair, as in the official code; PEFT shares one pair. Init A against B: arXiv 2406.08447.
    """

    paper: ClassVar[str] = "2106.09685"
    hosts: ClassVar[frozenset[str]] = frozenset({"linear", "embedding", "conv"})
    learning_rate: ClassVar[float] = 1.5e-3
    width_power: ClassVar[float] = 1.0

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    start: str = "A"

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def init(self, site: Site) -> dict[str, Any]:
        A = torch.zeros(self.rank, site.in_features)
        B = torch.zeros(site.out_features, self.rank)
        if site.kind == "embedding":
            nn.init.normal_(B)
        else:
            nn.init.kaiming_uniform_(A if self.start == "A" else B, a=math.sqrt(5))
        return {"A": nn.Parameter(A), "B": nn.Parameter(B)}

    def count(self, site: Site) -> int:
        return self.rank * (site.in_features + site.out_features)

    def weight(self, W: Tensor, p: Any) -> Tensor:
        return W + self.scale * (p.B @ p.A)

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        return base(x) + self.scale * (base.affine(dropout(x, self.dropout, p), p.A) @ p.B.mT)

    def row_norm(self, base: Base, p: Any) -> Tensor:
        """‖W + sBA‖ per row = √(‖W‖² + 2s·Σ (W Aᵀ)∘B + s²·Σ B(AAᵀ)∘B), without the (out, in) sum."""
        W, A, B, s = base.weight, p.A, p.B, self.scale
        cross, square = (W @ A.mT) * B, (B @ (A @ A.mT)) * B
        norm = torch.linalg.vector_norm(W, dim=1)
        wide = norm if norm.element_size() > 2 else norm.float()
        return (wide.square() + 2 * s * cross.sum(1) + s * s * square.sum(1)).clamp(min=0).sqrt()
