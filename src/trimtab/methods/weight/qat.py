"""QAT: quantization-aware training, rounding to the range of the weights with a straight-through gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.core.fake_quantized import FakeQuantized, straight


@dataclass(frozen=True)
class QAT(FakeQuantized):
    """W' = s (round((V − min V) / s) + min V / s), s = (max V − min V) / (2^bits − 1), and ∂W'/∂V = 1.

    V (out, in), and c (out) where there is a bias, start as copies of W and b; min and max are those of each output, or
    of each group of `group_size` inputs, now. Trains in·out + out values: as much memory as full fine-tuning, and a
    rounded copy of the weight per pass. What is saved are the codes with their scales. Mergeable (W' replaces W),
    exactly also into affine codes of equal bits and groups.
    arXiv 1308.3432 for the gradient; the grid is that of the affine format. The full-training row of PEQA's table.
    """

    paper: ClassVar[str] = "1308.3432"

    def steps(self, W: Tensor) -> dict[str, Any]:
        return {}

    def rounded(self, V: Tensor, p: Any) -> Tensor:
        low, s = self.range_of(V.detach())
        zero = -low / s
        return (straight((V - low) / s) - zero) * s

    def stored(self, V: Tensor, p: Any) -> tuple[Tensor, Tensor, Tensor]:
        low, s = self.range_of(V)
        return ((V - low) / s).round().clamp_(0, 2**self.code_bits - 1), s[..., 0], (-low / s)[..., 0]

    def range_of(self, V: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest value and scale of every group, (out, groups, 1); a group of equal values has scale 1."""
        low, high = V.amin(-1, keepdim=True), V.amax(-1, keepdim=True)
        s = (high - low) / (2**self.code_bits - 1)
        return low, torch.where(s < torch.finfo(V.dtype).tiny, torch.ones_like(s), s)
