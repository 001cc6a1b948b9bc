"""GGUF's blocks as codes of ours: the numbers as they are, each group's scale and zero point worked out of its block.

A block is a row of bytes. What it stands for is scale · q + low by groups; ours is (q - zero) scale, so zero = -low /
scale in fp32, an integer where the block has no `low` of its own. Five- and six-bit numbers are kept in bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trimtab.core.bits import pack
from trimtab.core.errors import UserError
from trimtab.core.format import Format
from trimtab.models.coded.source import Coded
from trimtab.storage.absmax import Absmax
from trimtab.storage.affine import Affine

Parts = tuple[Tensor, Tensor, Tensor]
"""Numbers (blocks, size) uint8, scales (blocks, groups) fp32, zero points or lows (blocks, groups) fp32."""


def halves(raw: Tensor) -> Tensor:
    """fp16 numbers (blocks, count) of pairs of bytes, in fp32."""
    return raw.contiguous().view(torch.float16).float()


def fields(raw: Tensor, chunk: int, bits: int) -> Tensor:
    """The numbers of `bits` in chunks of bytes: the lowest ones of a whole chunk, then the next ones of it."""
    count = 8 // bits
    shifts = torch.arange(count, dtype=torch.uint8) * bits
    parts = raw.view(len(raw), -1, 1, chunk) >> shifts[:, None]
    return (parts & (2**bits - 1)).reshape(len(raw), -1)


def bits_of(raw: Tensor) -> Tensor:
    """Bit i of every byte of a row as numbers 0 and 1, (blocks, 8, bytes): bit 0 of all bytes first."""
    return (raw[:, None] >> torch.arange(8, dtype=torch.uint8)[:, None]) & 1


def scales_and_lows(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of six bits each in twelve bytes."""
    first, second, third = raw.view(-1, 3, 4).unbind(1)
    scale = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], 1)
    low = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], 1)
    return scale.float(), low.float()


def q4_0(raw: Tensor) -> Parts:
    scale = halves(raw[:, :2])
    return fields(raw[:, 2:].contiguous(), 16, 4), scale, torch.full_like(scale, 8.0)


def q4_1(raw: Tensor) -> Parts:
    return fields(raw[:, 4:].contiguous(), 16, 4), halves(raw[:, :2]), halves(raw[:, 2:4])


def fifth(raw: Tensor) -> Tensor:
    """Bit i of four bytes, lowest first, for each of 32 numbers."""
    return ((raw[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1).reshape(len(raw), 32)


def q5_0(raw: Tensor) -> Parts:
    scale = halves(raw[:, :2])
    numbers = fields(raw[:, 6:].contiguous(), 16, 4) | fifth(raw[:, 2:6]) << 4
    return numbers, scale, torch.full_like(scale, 16.0)


def q5_1(raw: Tensor) -> Parts:
    numbers = fields(raw[:, 8:].contiguous(), 16, 4) | fifth(raw[:, 4:8]) << 4
    return numbers, halves(raw[:, :2]), halves(raw[:, 2:4])


def q2_k(raw: Tensor) -> Parts:
    packed, d, least = raw[:, :16], halves(raw[:, 80:82]), halves(raw[:, 82:84])
    return fields(raw[:, 16:80].contiguous(), 32, 2), d * (packed & 15).float(), -least * (packed >> 4).float()


def q3_k(raw: Tensor) -> Parts:
    high = bits_of(raw[:, :32]).reshape(len(raw), 256)
    numbers = fields(raw[:, 32:96].contiguous(), 32, 2) | high << 2
    low = fields(raw[:, 96:104].contiguous(), 8, 4)
    scale = (low | fields(raw[:, 104:108].contiguous(), 4, 2) << 4).float() - 32
    scale = halves(raw[:, 108:]) * scale
    return numbers, scale, torch.full_like(scale, 4.0)


def q4_k(raw: Tensor) -> Parts:
    scale, low = scales_and_lows(raw[:, 4:16].contiguous())
    numbers = fields(raw[:, 16:].contiguous(), 32, 4)
    return numbers, halves(raw[:, :2]) * scale, -halves(raw[:, 2:4]) * low


def q5_k(raw: Tensor) -> Parts:
    scale, low = scales_and_lows(raw[:, 4:16].contiguous())
    high = bits_of(raw[:, 16:48]).reshape(len(raw), 256)
    numbers = fields(raw[:, 48:].contiguous(), 32, 4) | high << 4
    return numbers, halves(raw[:, :2]) * scale, -halves(raw[:, 2:4]) * low


def q6_k(raw: Tensor) -> Parts:
    numbers = fields(raw[:, :128].contiguous(), 64, 4) | fields(raw[:, 128:192].contiguous(), 32, 2) << 4
    scale = halves(raw[:, 208:]) * raw[:, 192:208].contiguous().view(torch.int8).float()
    return numbers, scale, torch.full_like(scale, 32.0)


BLOCKS: dict[str, tuple[Callable[[Tensor], Parts], int, int, bool]] = {
    "Q4_0": (q4_0, 4, 32, False),
    "Q4_1": (q4_1, 4, 32, True),
    "Q5_0": (q5_0, 8, 32, False),
    "Q5_1": (q5_1, 8, 32, True),
    "Q2_K": (q2_k, 2, 16, True),
    "Q3_K": (q3_k, 3, 16, False),
    "Q4_K": (q4_k, 4, 32, True),
    "Q5_K": (q5_k, 8, 32, True),
    "Q6_K": (q6_k, 8, 16, False),
}
"""Type -> how a block is taken apart, bits of a code of ours, numbers in a group, whether it has lows of its own."""
BYTES = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34, "Q2_K": 84, "Q3_K": 110, "Q4_K": 144}
BYTES |= {"Q5_K": 176, "Q6_K": 210}


def format_of(kind: str) -> Format | None:
    """The format of ours that holds a type of blocks, None where none does."""
    if kind == "Q8_0":
        return Absmax(32)
    return Affine(BLOCKS[kind][1], BLOCKS[kind][2]) if kind in BLOCKS else None


def coded(kind: str, raw: Tensor, shape: tuple[int, int], arrange: Callable[[Tensor], Tensor]) -> Coded:
    """The codes of a matrix whose rows are blocks; `arrange` brings rows (out, ...) into their order.

    Numbers are taken over as they are. Only of a group whose scale is 0, whose numbers mean nothing, they become 0.
    """
    format = format_of(kind)
    assert format is not None
    out = shape[0]
    blocks = raw.reshape(-1, BYTES[kind])
    if isinstance(format, Absmax):
        scale = finite(halves(blocks[:, :2]))
        codes = blocks[:, 2:].contiguous().view(torch.int8).view(shape)
        absmax = arrange((scale * 127).view(out, -1)).reshape(-1)
        return Coded(format, {"codes": arrange(codes).contiguous(), "absmax": absmax}, shape)
    read, bits, size, lows = BLOCKS[kind]
    numbers, scale, zero = read(blocks)
    scale, zero = finite(scale), finite(zero)
    empty = scale == 0
    zero = -zero.double() / torch.where(empty, 1.0, scale).double() if lows else zero.masked_fill(empty, 0.0)
    numbers = numbers.view(len(numbers), -1, size).masked_fill(empty[..., None], 0)
    tensors = {
        "codes": pack(arrange(numbers.view(shape)).reshape(-1), bits),
        "scale": arrange(torch.where(empty, 1.0, scale).view(out, -1)).contiguous(),
        "zero": arrange(zero.float().view(out, -1)).contiguous(),
    }
    return Coded(format, tensors, shape)


def finite(values: Tensor) -> Tensor:
    """The same, or an error."""
    if not bool(torch.isfinite(values).all()):
        raise UserError("scales that are infinite or NaN", fix="copy the file again from where the model came from")
    return values
