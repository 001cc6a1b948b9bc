"""What the formats share: the check of the input, blocks of the flattened matrix, table look-up.

A matrix is flattened row-major and cut into blocks of `block_size` values; the last block may be shorter.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trimtab.core.errors import UserError

PIECE = 1 << 22
"""Values handled at once where an intermediate is wider than the result."""


def checked(W: Tensor, name: str) -> Tensor:
    """`W` in contiguous fp32, refused when it is empty, not floating, or has entries no code can stand for."""
    if not W.is_floating_point():
        kind = str(W.dtype).removeprefix("torch.")
        raise UserError(f"{name}: cannot encode a tensor of {kind}", fix="pass a floating matrix")
    if W.ndim == 0 or W.numel() == 0:
        raise UserError(f"{name}: cannot encode a tensor of shape {tuple(W.shape)}", fix="pass a matrix with entries")
    W = W.detach()
    wide = W.float().contiguous()
    if not wide.is_meta and not bool(torch.isfinite(wide.sum())):
        bad = sum(int((~torch.isfinite(piece)).sum()) for piece in wide.view(-1).split(PIECE))
        if bad:
            raise UserError(
                f"{name}: {bad} of {W.numel()} entries are infinite, NaN or beyond fp32",
                fix="the checkpoint is damaged or overflowed; load it again in a wider dtype",
            )
    return wide


def positive(value: int, field: str, name: str) -> None:
    """Refuse a size that is not a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name}: {field}={value!r} is not a positive whole number", fix=f"e.g. {field}=64")


def blocks(count: int, block_size: int) -> int:
    """Number of blocks that `count` values make."""
    return -(-count // block_size)


def pieces(count: int, block_size: int) -> Iterator[slice]:
    """Slices that cover `count` values, each but the last one a whole number of blocks."""
    step = max(1, PIECE // block_size) * block_size
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def block_absmax(flat: Tensor, block_size: int) -> Tensor:
    """Largest magnitude of every block (blocks)."""
    full = flat.numel() // block_size * block_size
    parts = [flat[piece].view(-1, block_size).abs().amax(1) for piece in pieces(full, block_size)]
    return torch.cat([*parts, flat[full:].abs().amax().view(1)] if full < flat.numel() else parts)


def scale_blocks(flat: Tensor, scale: Tensor, block_size: int) -> Tensor:
    """Multiply every block by its scale, in place unless a gradient is wanted for the scale."""
    full = flat.numel() // block_size * block_size
    if scale.requires_grad:
        return flat * scale.repeat_interleave(block_size)[: flat.numel()]
    if full:
        flat[:full].view(-1, block_size).mul_(scale[: full // block_size, None])
    if full < flat.numel():
        flat[full:].mul_(scale[-1])
    return flat


def lookup(index: Tensor, table: Tensor) -> Tensor:
    """Rows of `table` (entries, width) at a flat integer `index`, as one flat fp32 tensor.

    On a CPU a row is read as one wide number: several times faster than a row gather, and than 64-bit indices.
    """
    width = table.shape[1]
    table = table.to(index.device)
    packed = {1: torch.float32, 2: torch.complex64, 4: torch.complex128}.get(width)
    if index.device.type != "cpu" or packed is None:
        return table.index_select(0, index.int()).flatten()
    out = torch.empty(index.numel() * width, dtype=torch.float32)
    entries, rows = table.view(packed).view(-1), out.view(packed)
    for start in range(0, index.numel(), PIECE // width):
        part = slice(start, start + PIECE // width)
        torch.index_select(entries, 0, index[part].int(), out=rows[part])
    return out


def unpack_table(levels: Tensor, bits: int) -> Tensor:
    """What every byte decodes to, (256, 8 / bits), when codes of `bits` are packed first-in-highest-bits."""
    byte = torch.arange(256, device="cpu")
    shifts = range(8 - bits, -1, -bits)
    return torch.stack([levels[(byte >> shift) & (2**bits - 1)] for shift in shifts], 1).contiguous()
