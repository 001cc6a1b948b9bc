"""FP4: the 4-bit floating code of bitsandbytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, dataclass

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.format import Format
from trimtab.storage._blocks import positive, unpack_table
from trimtab.storage._four_bit import bits_of_four, decode_four_bits, encode_four_bits, encode_scales
from trimtab.storage.dynamic8 import Dynamic8

MAGNITUDES = torch.tensor([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0], dtype=torch.float32, device="cpu") / 12
"""By the three lower bits of a code, whose order is not that of the values; the fourth bit is the sign."""
LEVELS = torch.cat([MAGNITUDES, -MAGNITUDES])
PAIRS = unpack_table(LEVELS, 4)
ORDER = torch.tensor([11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3], dtype=torch.uint8, device="cpu")
"""Codes by rising value; of the two zeros the one called 0 first."""
MIDPOINTS = (LEVELS[ORDER.int()][:-1] + LEVELS[ORDER.int()][1:]) / 2


def nearest(scaled: Tensor) -> Tensor:
    """Code of the level nearest to each value of [-1, 1]; halfway, the lower one. What rounds to zero from above is
    called -0 (8), as by bitsandbytes' CPU kernel; its GPU kernel does it the other way round, and both decode alike."""
    place = torch.bucketize(scaled, MIDPOINTS.to(scaled.device), out_int32=True)
    return ORDER.to(scaled.device).index_select(0, place)


@dataclass(frozen=True)
class FP4(Format):
    """q = code of the level nearest to W / absmax, absmax = max |W| of each block of the row-major flattened matrix.

    The levels are ± 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3 and 1: a sign, two bits of exponent and one of mantissa, as
    bitsandbytes has them (not those of OCP's FP4). Two codes a byte, the first one in the high half. `scale` is a
    format for the block scales; `FP4(double=True)` is short for the one that NF4 has.

    Codes and scales are bit-equal with bitsandbytes on a CPU. Encoding a decoded matrix again gives the same values; a
    zero may get the other of its two codes. Tensors: `codes` uint8 (ceil(count / 2), 1); `absmax`
    fp32 (blocks), or with `scale` its tensors: `absmax_codes`... Bits per weight, up to the padding of an odd count:
    4 + 32 / block_size; 4.127 with double quantization at 64. Error <= absmax / 6 (half of the widest gap), in the mean
    0.097 of a normal deviate, against NF4's 0.073: kept for checkpoints that have it.
    Reference: QLoRA, arXiv 2305.14314, which compares both.
    """

    block_size: int = 64
    scale: Format | None = None
    double: InitVar[bool] = False

    def __post_init__(self, double: bool) -> None:
        positive(self.block_size, "block_size", "FP4")
        if self.scale is not None and not isinstance(self.scale, Format):
            raise UserError(f"FP4: scale={self.scale!r} is not a storage format", fix="e.g. scale=Dynamic8(256)")
        if double:
            twice = Dynamic8(block_size=256, center=True, grid=65536)
            if self.scale not in (None, twice):
                raise UserError(f"FP4: double=True and scale={self.scale!r} contradict", fix="give one of them")
            object.__setattr__(self, "scale", twice)

    def encode(self, W: Tensor) -> dict[str, Tensor]:
        packed, absmax = encode_four_bits(W, "FP4", self.block_size, nearest, zero=0)
        return {"codes": packed, **encode_scales(absmax, self.scale)}

    def decode(self, code: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        return decode_four_bits(code, shape, PAIRS, self.block_size, self.scale)

    def bits(self, shape: tuple[int, ...]) -> float:
        return bits_of_four(shape, self.block_size, self.scale)
