"""RoAd: the outputs of a layer are rotated and scaled in pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.blocks import require_blocks
from trimtab.core.errors import UserError
from trimtab.core.method import WeightMethod
from trimtab.core.site import Base, Site


@dataclass(frozen=True)
class RoAd(WeightMethod):
    """(y₁, y₂) ← α (y₁ cos θ − y₂ sin θ, y₁ sin θ + y₂ cos θ) for pairs of outputs; so W' = R W and b' = R b.

    A pair is the same place in both halves of a group of `group_size` outputs. `angles` 1 gives each pair one θ = 0 and
    α = 1, 2 one per output, 4 one per entry of its 2×2 matrix: θ and α (angles·out / 2), which start at 0 and 1. A few
    multiplications per channel and token, so adapters of many rows mix cheaply; nothing after merging. Mergeable.
    arXiv 2409.00119 (2D rotations of neighbours: group_size 2); wider groups are PEFT's, which saves shuffling.
    """

    paper: ClassVar[str] = "2409.00119"
    learning_rate: ClassVar[float] = 1e-2

    angles: int = 1
    group_size: int = 64

    def __post_init__(self) -> None:
        if self.angles not in (1, 2, 4) or self.group_size < 2 or self.group_size % 2:
            raise UserError(
                f"RoAd: angles={self.angles}, group_size={self.group_size}", fix="1, 2 or 4 angles; an even group_size"
            )

    def init(self, site: Site) -> dict[str, Any]:
        require_blocks("RoAd", site, self.group_size, site.out_features)
        size = self.count(site) // 2
        return {"theta": nn.Parameter(torch.zeros(size)), "alpha": nn.Parameter(torch.ones(size))}

    def count(self, site: Site) -> int:
        return self.angles * site.out_features

    def columns(self, p: Any) -> tuple[Tensor, Tensor]:
        """What an output is multiplied by, and what its partner is, each (out / group_size, 2, group_size / 2)."""
        half = self.group_size // 2
        straight, across = p.alpha * torch.cos(p.theta), p.alpha * torch.sin(p.theta)
        if self.angles == 4:
            straight, across = straight.unflatten(-1, (-1, 2, 2, half)), across.unflatten(-1, (-1, 2, 2, half))
            return straight[..., 0, :, :], across[..., 1, :, :]
        return straight.unflatten(-1, (-1, self.angles, half)), across.unflatten(-1, (-1, self.angles, half))

    def turned(self, y: Tensor, p: Any) -> Tensor:
        """R y for y (..., out)."""
        straight, across = self.columns(p)
        pairs = y.unflatten(-1, (-1, 2, self.group_size // 2))
        partner = torch.stack([-pairs[..., 1, :], pairs[..., 0, :]], -2)
        return (pairs * straight + partner * across).flatten(-3)

    def weight(self, W: Tensor, p: Any) -> Tensor:
        return self.turned(W.mT, p).mT

    def bias(self, b: Tensor | None, p: Any) -> Tensor | None:
        return b if b is None else self.turned(b, p)

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        return self.turned(base(x), p)
