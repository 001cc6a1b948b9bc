"""Symmetric 8-bit integers with one scale per row or per block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.format import Format
from trimtab.storage._blocks import block_absmax, blocks, checked, positive, scale_blocks

LIFT = 2.0**100
"""Rows smaller than 1e-36 are multiplied by this first: 127 / absmax would overflow. An exact power of two."""


@dataclass(frozen=True)
class Absmax(Format):
    """q = round(127 W / absmax), W ~ absmax q / 127, where absmax = max |W| over a row or a block.

    `block_size=None` is vector-wise: one scale per output row, the layout of bitsandbytes' int8 (`codes` is its `CB`,
    `absmax` its `SCB`). A number means blocks of that many values of the row-major flattened matrix; the last one may
    be shorter. Rounding is half to even; -128 never occurs; a row of zeros stays zero. Error <= absmax / 254.

    Tensors: `codes` int8 (out, in); `absmax` fp32 (out) or (blocks).
    Bits per weight: 8 + 32 / in, or 8 + 32 blocks / (out in).
    Encoding a decoded matrix again gives the same codes, and an absmax that is equal up to an ulp.
    Reference: LLM.int8(), arXiv 2208.07339. Outliers are not split off: this is storage, the product is not in int8.
    """

    block_size: int | None = None

    def __post_init__(self) -> None:
        if self.block_size is not None:
            positive(self.block_size, "block_size", "Absmax")

    def encode(self, W: Tensor) -> dict[str, Tensor]:
        flat = checked(W, "Absmax").view(-1)
        size = self._size(W.shape)
        absmax = block_absmax(flat, size)
        lift = torch.where(absmax < 1e-36, LIFT, 1.0)
        lifted = absmax * lift
        factor = 127.0 / torch.where(lifted > 0, lifted, 1.0)
        scaled = scale_blocks(scale_blocks(flat.clone(), lift, size), factor, size)
        return {"codes": scaled.round_().to(torch.int8).view(W.shape), "absmax": absmax}

    def decode(self, code: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        absmax = code["absmax"].float()
        return scale_blocks(code["codes"].float().view(-1), absmax * (1 / 127), self._size(shape)).view(shape)

    def bits(self, shape: tuple[int, ...]) -> float:
        count = math.prod(shape)
        return 8 + 32 * blocks(count, self._size(shape)) / count

    def _size(self, shape: tuple[int, ...]) -> int:
        return shape[-1] if self.block_size is None else self.block_size
