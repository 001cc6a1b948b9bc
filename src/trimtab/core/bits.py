"""Small whole numbers as a stream of bits: first number first, in the highest bits, row-major."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits as a byte stream, first code in the highest bits; padded with zeros at the end."""
    if bits == 8:
        return codes
    together = math.lcm(bits, 8) // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.numel() % together)).view(-1, together)
    word = torch.zeros(codes.shape[0], dtype=torch.int32, device=codes.device)
    for column in codes.unbind(1):
        word = (word << bits) | column
    width = together * bits
    return torch.stack([((word >> shift) & 255).to(torch.uint8) for shift in range(width - 8, -1, -8)], 1).flatten()


def unpack(stream: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes (uint8) of what `pack` made."""
    if bits == 8:
        return stream[:count]
    width = math.lcm(bits, 8)
    word = torch.zeros(stream.numel() * 8 // width, dtype=torch.int32, device=stream.device)
    for column in stream.view(-1, width // 8).unbind(1):
        word = (word << 8) | column
    codes = [((word >> shift) & (2**bits - 1)).to(torch.uint8) for shift in range(width - bits, -1, -bits)]
    return torch.stack(codes, 1).flatten()[:count]


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `pack` makes of `count` codes."""
    together = math.lcm(bits, 8) // bits
    return -(-count // together) * together * bits // 8
