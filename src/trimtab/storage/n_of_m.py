"""N of M: the largest few of every group of neighbouring inputs, the pattern that sparse tensor cores take."""

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
class NOfM(Format):
    """W with all but the `keep` largest |W| of every `of` neighbouring inputs of an output zero; 2 of 4 by default.

    A matrix that has the pattern already, by whatever pruning, is kept as it is. Entries are rounded to `dtype`.

    Tensors: `values` (out, in · keep / of) in `dtype`; `kept` uint8, one bit per entry in row-major order, first in the
    highest bit. Bits per weight: 1 + keep / of times those of `dtype`. Encoding a decoded matrix again gives the same.
    Errors: `of` must divide in; an entry beyond the range of `dtype`.
    """

    keep: int = 2
    of: int = 4
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES or not 1 <= self.keep <= self.of:
            raise UserError(
                f"NOfM: keep={self.keep!r}, of={self.of!r}, dtype={self.dtype!r}",
                fix=f"1 <= keep <= of, for example 2 of 4, and one of {listing(DTYPES)}",
            )

    def encode(self, W: Tensor) -> dict[str, Tensor]:
        wide = checked(W, "NOfM")
        if W.shape[-1] % self.of:
            raise UserError(f"NOfM: of={self.of} does not divide in_features={W.shape[-1]}", fix="leave this layer out")
        groups = wide.view(-1, self.of)
        index = groups.abs().topk(self.keep, 1).indices.sort(1).values
        values = groups.gather(1, index).to(DTYPES[self.dtype]).view(*W.shape[:-1], -1)
        if not values.is_meta and not bool(torch.isfinite(values).all()):
            largest = float(wide.abs().max())
            raise UserError(f"NOfM: entries up to {largest:.3g} overflow {self.dtype}", fix='dtype="bfloat16"')
        kept = torch.zeros_like(groups, dtype=torch.uint8).scatter_(1, index, 1)
        return {"values": values, "kept": pack(kept.view(-1), 1)}

    def decode(self, code: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        kept = lookup(code["kept"], BITS)[: math.prod(shape)].bool()
        return torch.zeros_like(kept, dtype=torch.float32).masked_scatter(kept, code["values"].float()).view(shape)

    def bits(self, shape: tuple[int, ...]) -> float:
        size = math.prod(shape)
        return (8 * packed_bytes(size, 1) + size // self.of * self.keep * 8 * DTYPES[self.dtype].itemsize) / size
