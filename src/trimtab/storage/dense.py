"""Dense storage: the identity, kept in a floating type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.errors import UserError, listing
from trimtab.core.format import Format
from trimtab.storage._blocks import checked

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Dense(Format):
    """W itself, rounded to `dtype`.

    Tensors: `values` (out, in). Bits per weight: those of `dtype`. Errors: an entry beyond the range of `dtype`.
    """

    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"Dense: dtype={self.dtype!r} is not known", fix=f"one of {listing(DTYPES)}")

    def encode(self, W: Tensor) -> dict[str, Tensor]:
        values = checked(W, "Dense").to(DTYPES[self.dtype], copy=True)
        if not values.is_meta and not bool(torch.isfinite(values).all()):
            largest = float(W.abs().max())
            raise UserError(f"Dense: entries up to {largest:.3g} overflow {self.dtype}", fix='dtype="bfloat16"')
        return {"values": values}

    def decode(self, code: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        return code["values"].float().view(shape)

    def bits(self, shape: tuple[int, ...]) -> float:
        return 8.0 * DTYPES[self.dtype].itemsize
