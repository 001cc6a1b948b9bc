"""Four-bit codes of blocks with a scale each, as bitsandbytes packs them: what NF4 and FP4 share but the levels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from trimtab.core.format import Format
from trimtab.storage._blocks import block_absmax, blocks, checked, lookup, pieces, scale_blocks

TINY = 1e-38


def encode_four_bits(
    W: Tensor, name: str, size: int, nearest: Callable[[Tensor], Tensor], zero: int
) -> tuple[Tensor, Tensor]:
    """(codes (ceil(count / 2), 1), absmax (blocks)) of W: two codes a byte, the first one in the high half.

    `nearest` tells the code of values in [-1, 1]; `zero` is the code of 0, which fills an odd count. The arithmetic is
    the CPU kernel's: whole blocks are multiplied with the fp32 reciprocal of absmax, a shorter last one is divided.
    """
    flat = checked(W, name).view(-1)
    count = flat.numel()
    full = count // size * size
    absmax = block_absmax(flat, size)
    if full < count:
        absmax[-1].clamp_(min=TINY)
    codes = torch.full((count + count % 2,), zero, dtype=torch.uint8, device=W.device)
    for piece in pieces(full, size):
        part = flat[piece].clone()
        scale_blocks(part, 1.0 / absmax[piece.start // size : piece.stop // size].clamp(min=TINY), size)
        codes[piece] = nearest(part.clamp_(-1, 1))
    if full < count:
        codes[full:count] = nearest((flat[full:] / absmax[-1]).clamp_(-1, 1))
    return ((codes[::2] << 4) | codes[1::2]).unsqueeze(1), absmax


def encode_scales(absmax: Tensor, scale: Format | None) -> dict[str, Tensor]:
    """The block scales as they are, or in a format of their own."""
    if scale is None:
        return {"absmax": absmax}
    return {f"absmax_{key}": value for key, value in scale.encode(absmax).items()}


def decode_four_bits(
    code: Mapping[str, Tensor], shape: tuple[int, ...], pairs: Tensor, size: int, scale: Format | None
) -> Tensor:
    """W from its codes; `pairs` (256, 2) holds what every byte stands for."""
    count = math.prod(shape)
    if scale is None:
        absmax = code["absmax"].float()
    else:
        nested = {key.removeprefix("absmax_"): value for key, value in code.items() if key.startswith("absmax_")}
        absmax = scale.decode(nested, (blocks(count, size),))
    return scale_blocks(lookup(code["codes"].view(-1), pairs)[:count], absmax, size).view(shape)


def bits_of_four(shape: tuple[int, ...], size: int, scale: Format | None) -> float:
    """Bits per weight: the codes, and the scales in their format."""
    count = math.prod(shape)
    scales = blocks(count, size)
    each = 32.0 if scale is None else scale.bits((scales,))
    return (8 * ((count + 1) // 2) + each * scales) / count
