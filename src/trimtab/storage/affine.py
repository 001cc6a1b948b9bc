"""Asymmetric integers per group of inputs, with floating zero points."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.bits import pack, packed_bytes
from trimtab.core.errors import UserError, listing
from trimtab.core.format import Format
from trimtab.storage._blocks import checked, lookup, positive, unpack_table

INTEGERS = torch.arange(256, dtype=torch.float32, device="cpu")
TABLES = {bits: unpack_table(INTEGERS, bits) for bits in (2, 4)}
TRIPLES = torch.stack([INTEGERS[torch.arange(4096, device="cpu") >> shift & 7] for shift in (9, 6, 3, 0)], 1)
"""What 12 bits decode to as four 3-bit codes: half of the three bytes that eight codes fill."""


@dataclass(frozen=True)
class Affine(Format):
    """W ~ (q - zero) scale, per group of `group_size` neighbouring inputs of one output; q = round((W - min) / scale).

    `group_size` None is one group per output. scale = (max - min) / (2^bits - 1) and zero = -min / scale, both fp32.
    The zero point is not rounded to an integer: QA-LoRA folds its update into it exactly, PEQA trains the scale. A
    group of equal values is kept exactly, with scale 1. Codes are a bit stream in row-major order, first code in the
    highest bits; 3-bit codes lie eight in three bytes.

    Tensors: `codes` uint8 (bytes); `scale` and `zero` fp32 (out, in / group_size).
    Bits per weight, up to the padding of the last byte: bits + 64 / group_size.
    Error <= scale / 2. Encoding a decoded matrix again gives the same codes, unless a group spreads over less than
    about 1e-6 of its size, where fp32 cannot hold (q - zero) well. Errors: `group_size` must divide in.
    Reference: QA-LoRA, arXiv 2309.14717; GPTQ's integer zero points are a special case.
    """

    code_bits: int = 4
    group_size: int | None = 32

    def __post_init__(self) -> None:
        if self.code_bits not in (2, 3, 4, 8):
            raise UserError(f"Affine: code_bits={self.code_bits!r} is not stored", fix="one of 2, 3, 4, 8")
        if self.group_size is not None:
            positive(self.group_size, "group_size", "Affine")

    def encode(self, W: Tensor) -> dict[str, Tensor]:
        size = self.size_in(W.shape)
        groups = checked(W, "Affine").view(*W.shape[:-1], -1, size)
        top = 2**self.code_bits - 1
        low, scale, zero = grid_of(groups, top)
        codes = ((groups - low[..., None]) / scale[..., None]).round_().clamp_(0, top).to(torch.uint8)
        return {"codes": pack(codes.view(-1), self.code_bits), "scale": scale, "zero": zero}

    def decode(self, code: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        scale, zero = code["scale"].float(), code["zero"].float()
        groups = self.integers(code, shape).view(*scale.shape, self.size_in(shape))
        if scale.requires_grad or zero.requires_grad:
            return ((groups - zero[..., None]) * scale[..., None]).view(shape)
        return groups.sub_(zero[..., None]).mul_(scale[..., None]).view(shape)

    def integers(self, code: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """The codes themselves as fp32 numbers of `shape`."""
        stream = code["codes"]
        if self.code_bits == 3:
            first, second, third = stream.view(-1, 3).int().unbind(1)
            halves = torch.stack([first << 4 | second >> 4, (second & 15) << 8 | third], 1)
            flat = lookup(halves.view(-1), TRIPLES)
        elif self.code_bits == 8:
            flat = stream.float()
        else:
            flat = lookup(stream, TABLES[self.code_bits])
        return flat[: math.prod(shape)].view(shape)

    def bits(self, shape: tuple[int, ...]) -> float:
        count = math.prod(shape)
        return (8 * packed_bytes(count, self.code_bits) + 64 * (count // self.size_in(shape))) / count

    def size_in(self, shape: tuple[int, ...]) -> int:
        """Inputs in a group of a matrix of `shape`; refused where groups do not divide its inputs."""
        columns = shape[-1] if shape else 0
        size = columns if self.group_size is None else self.group_size
        if size == 0 or columns % size:
            divisors = [size for size in range(1, columns + 1) if columns % size == 0]
            raise UserError(
                f"{type(self).__name__}: group_size={self.group_size} does not divide in_features={columns}",
                fix=f"group_size = one of {listing(map(str, reversed(divisors)), 20)}",
            )
        return size


def grid_of(groups: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """(smallest value, scale, zero point) of groups along the last axis, each fp32, for codes 0 ... `top`."""
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high.double() - low.double()) / top).float()
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
    return low, scale, (-low.double() / scale.double()).float()
