"""Bat: blocks of the weight, each multiplied by and shifted with a small matrix of its row of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.blocks import require_blocks
from trimtab.core.method import WeightMethod
from trimtab.core.site import Site


@dataclass(frozen=True)
class Bat(WeightMethod):
    """W'_oi = W_oi + W_oi D_o + D_o for the (block_size, block_size) blocks of W: weight-guided, so of high rank.

    D (out / block_size, block_size, block_size) starts at 0. Costs block_size·in·out multiplications per step to build
    W'; nothing after merging. Mergeable.
    arXiv 2409.15371, the block-affine variant of MiSS (Bone).
    """

    paper: ClassVar[str] = "2409.15371"
    learning_rate: ClassVar[float] = 3e-4  # 1e-4 at a width of 3,072, as PEFT compares it
    width_power: ClassVar[float] = 1.0
    laws: ClassVar[Mapping[str, str]] = {"cost": "every block of W enters its own update, so W' itself is built"}

    block_size: int = 64

    def init(self, site: Site) -> dict[str, Any]:
        b = self.block_size
        require_blocks("Bat", site, b, site.out_features, site.in_features)
        return {"D": nn.Parameter(torch.zeros(site.out_features // b, b, b))}

    def count(self, site: Site) -> int:
        return site.out_features * self.block_size

    def weight(self, W: Tensor, p: Any) -> Tensor:
        b = self.block_size
        blocks = W.unflatten(-1, (-1, b)).unflatten(-3, (-1, b)).transpose(-3, -2)  # (out/b, in/b, b, b)
        D = p.D[..., :, None, :, :]
        return (blocks + blocks @ D + D).transpose(-3, -2).flatten(-4, -3).flatten(-2)
