"""A format whose inputs stand in another order, so that columns far apart can share a group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.format import Format
from trimtab.storage._blocks import checked
from trimtab.storage.affine import Affine


@dataclass(frozen=True)
class Permuted(Format):
    """W[:, order] ~ decode of `inner`: column order[j] of W is column j of what `inner` holds.

    For checkpoints of GPTQ with `desc_act`, whose groups are made of columns that lie apart. Encoding takes the columns
    as they are: an order that helps is known only to the one who has seen the inputs.
    Tensors: those of `inner`; `order` int32 (in). Bits per weight: those of `inner`, + 32 / out. Error: that of it.
    Decoding costs a copy of W more. Reference: arXiv 2210.17323, section on the order of columns.
    """

    inner: Format = field(default_factory=Affine)

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Format) or isinstance(self.inner, Permuted) or self.inner.needs_inputs:
            raise UserError(f"Permuted: inner={self.inner!r} cannot store the columns", fix="e.g. inner=Affine()")

    def encode(self, W: Tensor) -> dict[str, Tensor]:
        W = checked(W, "Permuted")
        order = torch.arange(W.shape[-1], dtype=torch.int32, device=W.device)
        return {**self.inner.encode(W), "order": order}

    def decode(self, code: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        rest = {key: value for key, value in code.items() if key != "order"}
        W = self.inner.decode(rest, shape)
        return W.index_select(-1, code["order"].argsort().int())

    def bits(self, shape: tuple[int, ...]) -> float:
        return self.inner.bits(shape) + 32 * shape[-1] / (shape[0] * shape[-1])
