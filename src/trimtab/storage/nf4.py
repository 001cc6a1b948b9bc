"""NF4: the 4-bit code of QLoRA, in bitsandbytes' layout."""

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

LEVELS = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=torch.float32,
    device="cpu",
)
MIDPOINTS = (LEVELS[:-1] + LEVELS[1:]) / 2
PAIRS = unpack_table(LEVELS, 4)

CELLS = 32
"""Cells per unit in which `nearest` looks first: narrower than any two midpoints are apart."""
_cell_of = ((MIDPOINTS + 1) * CELLS).int()
BELOW = torch.bucketize(torch.arange(2 * CELLS + 1, device="cpu"), _cell_of).to(torch.uint8)
INSIDE = torch.full((2 * CELLS + 1,), 2.0, device="cpu").index_put_((_cell_of,), MIDPOINTS)


def nearest(scaled: Tensor) -> Tensor:
    """Index of the level nearest to each value of [-1, 1]; halfway, the lower one: the number of midpoints below it.

    A cell of the real line holds at most one midpoint, so one look-up and one comparison replace a search.
    """
    cell = scaled.add(1).mul_(CELLS).int()
    codes = BELOW.to(scaled.device).index_select(0, cell)
    return codes.add_(scaled > INSIDE.to(scaled.device).index_select(0, cell))


@dataclass(frozen=True)
class NF4(Format):
    """q = index of the level nearest to W / absmax, absmax = max |W| of each block of the row-major flattened matrix.

    The 16 levels are quantiles of a normal distribution scaled to [-1, 1], with an exact zero. Two codes a byte, the
    first one in the high half. `scale` is a format for the block scales themselves (double quantization); `NF4(double=
    True)` is short for `NF4(scale=Dynamic8(256, center=True, grid=65536))`.

    Codes, scales and offset are bit-equal with bitsandbytes 0.50.2 on a CPU: fp32 reciprocal (the last, shorter block
    is divided), midpoints in fp32, halfway to the lower code, the CPU kernel's grid for the scales. Its GPU kernels
    agree but for values within an ulp of halfway, and for scales with `scale=Dynamic8(256, center=True)`.

    Tensors: `codes` uint8 (ceil(count / 2), 1); `absmax` fp32 (blocks), or with `scale` its tensors: `absmax_codes`...
    Bits per weight, up to the padding of an odd count: 4 + 32 / block_size; with double quantization
    4 + 8 / block_size + 32 / (256 block_size) = 4.127 at 64, + 32 / count.
    Error <= 0.152 absmax (half of the widest gap), in the mean 0.073 of a normal deviate.
    Encoding a decoded matrix again gives the same codes and absmax; with double quantization the same codes, but the
    scales move within their own rounding. A block whose scale double quantization rounds to below zero flips its sign;
    that needs scales that differ by a factor of more than 100 within one tensor.
    Reference: QLoRA, arXiv 2305.14314.
    """

    block_size: int = 64
    scale: Format | None = None
    double: InitVar[bool] = False

    def __post_init__(self, double: bool) -> None:
        positive(self.block_size, "block_size", "NF4")
        if self.scale is not None and not isinstance(self.scale, Format):
            raise UserError(f"NF4: scale={self.scale!r} is not a storage format", fix="e.g. scale=Dynamic8(256)")
        if double:
            twice = Dynamic8(block_size=256, center=True, grid=65536)
            if self.scale not in (None, twice):
                raise UserError(f"NF4: double=True and scale={self.scale!r} contradict", fix="give one of them")
            object.__setattr__(self, "scale", twice)

    def encode(self, W: Tensor) -> dict[str, Tensor]:
        packed, absmax = encode_four_bits(W, "NF4", self.block_size, nearest, zero=7)
        return {"codes": packed, **encode_scales(absmax, self.scale)}

    def decode(self, code: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        return decode_four_bits(code, shape, PAIRS, self.block_size, self.scale)

    def bits(self, shape: tuple[int, ...]) -> float:
        return bits_of_four(shape, self.block_size, self.scale)
