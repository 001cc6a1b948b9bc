"""QA-LoRA: a low-rank update that is constant inside each quantization group, so it merges into the zero points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import WeightMethod, dropout
from trimtab.core.site import Base, Site

if TYPE_CHECKING:
    from trimtab.core.code import Code


@dataclass(frozen=True)
class QALoRA(WeightMethod):
    """y = W x + s·B A pool(x), with pool = the mean over each group of `group_size` inputs and s = alpha / rank.

    A (rank, in / group_size) Xavier-uniform, B (out, rank) = 0. Every input of a group meets the same update, so on an
    affine weight (codes − zero)·scale it is exactly a shift of the zero points: zero ← zero − (s / group_size)·(B A) /
    scale; codes and scales stay. Costs 2·rank·(in / group_size + out) multiplications per token; nothing after merging.
    Mergeable, exactly also into int2/3/4.
    arXiv 2309.14717. PEFT multiplies the pooled mean by the number of groups; this follows the official code.
    """

    paper: ClassVar[str] = "2309.14717"
    learning_rate: ClassVar[float] = 1.5e-3
    width_power: ClassVar[float] = 1.0

    rank: int = 16
    alpha: float = 16.0
    group_size: int = 32
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def init(self, site: Site) -> dict[str, Any]:
        stored = getattr(getattr(site.base.code, "format", None), "group_size", self.group_size)
        if stored != self.group_size or site.in_features % self.group_size:
            raise UserError(
                f"QALoRA: group_size={self.group_size}; {site.name} has {site.in_features} inputs, grouped by {stored}",
                fix=f"group_size={stored}, or another that divides {site.in_features}",
            )
        A = nn.init.xavier_uniform_(torch.empty(self.rank, site.in_features // self.group_size))
        return {"A": nn.Parameter(A), "B": nn.Parameter(torch.zeros(site.out_features, self.rank))}

    def count(self, site: Site) -> int:
        return self.rank * (site.in_features // self.group_size + site.out_features)

    def weight(self, W: Tensor, p: Any) -> Tensor:
        return W + (self.scale / self.group_size) * (p.B @ p.A).repeat_interleave(self.group_size, 1)

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        pooled = dropout(x.unflatten(-1, (-1, self.group_size)).mean(-1), self.dropout, p)
        return base(x) + self.scale * ((pooled @ p.A.mT) @ p.B.mT)

    def merge(self, code: Code, p: Any) -> dict[str, Tensor] | None:
        if getattr(code.format, "group_size", None) != self.group_size or "zero" not in code.tensors():
            return None
        tensors = code.tensors()
        shift = (self.scale / self.group_size) * (p.B @ p.A) / tensors["scale"]
        return {"zero": tensors["zero"] - shift.to(tensors["zero"].dtype)}
