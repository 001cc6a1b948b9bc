"""PEQA: a quantized weight whose scales train and whose integers stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import WeightMethod
from trimtab.core.site import Base, Site

if TYPE_CHECKING:
    from trimtab.core.code import Code


@dataclass(frozen=True)
class PEQA(WeightMethod):
    """W' = (g s) ∘ Q, where W = s ∘ Q are integers (zero points inside) times a scale per output, or group of inputs.

    g (out, 1), or (out, in / group_size), starts at 1. The frozen scales are s, g s what the paper calls s + Δs: a
    factor, so that one learning rate suits scales of every size. Merging writes g s where the scales are, exactly, and
    a task is no more than its scales; integers and zero points never change. On dense weights it rescales outputs.
    Costs out multiplications per token; with `group_size`, in·out per step, as W' is built. Mergeable, exactly also
    into affine codes, and per output into int8 of one scale a row.
    arXiv 2305.14152. No weight decay: it would pull the scales, not their change, to zero.
    """

    paper: ClassVar[str] = "2305.14152"
    learning_rate: ClassVar[float] = 1e-2
    """A factor of 1 moves by a hundredth: what SST-2, E2E and PTB do best with is 1 to 3 times this."""

    group_size: int | None = None

    def init(self, site: Site) -> dict[str, Any]:
        stored = getattr(getattr(site.base.code, "format", None), "group_size", self.group_size)
        size = self.group_size or site.in_features
        if site.in_features % size or (self.group_size and stored and self.group_size % stored):
            raise UserError(
                f"PEQA: group_size={self.group_size}; {site.name} has {site.in_features} inputs, grouped by {stored}",
                fix="leave group_size out, or a multiple of the format's that divides the inputs",
            )
        return {"g": nn.Parameter(torch.ones(site.out_features, site.in_features // size))}

    def count(self, site: Site) -> int:
        return site.out_features * (site.in_features // (self.group_size or site.in_features))

    def weight(self, W: Tensor, p: Any) -> Tensor:
        return W * p.g.repeat_interleave(W.shape[-1] // p.g.shape[-1], -1)

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        if p.g.shape[-1] > 1:
            return base.affine(x, self.weight(base.weight, p), base.bias)
        y = base.matmul(x) * p.g[..., 0]
        return y if base.bias is None else y + base.bias

    def merge(self, code: Code, p: Any) -> dict[str, Tensor] | None:
        tensors = code.tensors()
        name = "scale" if "scale" in tensors else "absmax"
        scales = tensors.get(name)
        if scales is None or scales.numel() % p.g.numel() or scales.shape[0] != p.g.shape[0]:
            return None
        groups = scales.view(p.g.shape[0], -1)
        return {name: (groups * p.g.repeat_interleave(groups.shape[1] // p.g.shape[1], 1)).view_as(scales)}
