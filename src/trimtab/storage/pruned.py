"""Pruned weights: what is left of a matrix, and where it was."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.bits import pack, packed_bytes
from trimtab.core.errors import UserError, listing
from trimtab.core.format import Format
from trimtab.storage._blocks import checked, lookup, unpack_table
from trimtab.storage.dense import DTYPES

BITS = unpack_table(torch.tensor([0.0, 1.0], device="cpu"), 1)


@dataclass(frozen=True)
class Pruned(Format):
    """W with all but its largest entries zero: the `sparsity` share with the smallest |W| of the matrix goes.

    A matrix that has that many zeros already, by whatever pruning, is kept as it is. Entries are rounded to `dtype`.

    Tensors: `values` (kept) in `dtype`, in row-major order; `kept` uint8, one bit per entry, first in the highest bit.
    Bits per weight: 1 + (1 - sparsity) times those of `dtype`. Encoding a decoded matrix again gives the same.
    Errors: a `sparsity` outside 0 to 1; an entry beyond the range of `dtype`.
    """

    sparsity: float = 0.5
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES or not 0 <= self.sparsity < 1:
            raise UserError(
                f"Pruned: sparsity={self.sparsity!r}, dtype={self.dtype!r}",
                fix=f"a share of 0 or more and below 1, and one of {listing(DTYPES)}",
            )

    def encode(self, W: Tensor) -> dict[str, Tensor]:
        flat = checked(W, "Pruned").view(-1)
        index = torch.topk(flat.abs(), self.left(W.numel())).indices.sort().values
        values = flat[index].to(DTYPES[self.dtype])
        if not values.is_meta and not bool(torch.isfinite(values).all()):
            largest = float(flat.abs().max())
            raise UserError(f"Pruned: entries up to {largest:.3g} overflow {self.dtype}", fix='dtype="bfloat16"')
        kept = torch.zeros_like(flat, dtype=torch.uint8).index_fill_(0, index, 1)
        return {"values": values, "kept": pack(kept, 1)}

    def decode(self, code: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        kept = lookup(code["kept"], BITS)[: math.prod(shape)].bool()
        return torch.zeros_like(kept, dtype=torch.float32).masked_scatter(kept, code["values"].float()).view(shape)

    def left(self, size: int) -> int:
        """How many of `size` entries are kept."""
        return size - int(self.sparsity * size)

    def bits(self, shape: tuple[int, ...]) -> float:
        size = math.prod(shape)
        return (8 * packed_bytes(size, 1) + self.left(size) * 8 * DTYPES[self.dtype].itemsize) / size
