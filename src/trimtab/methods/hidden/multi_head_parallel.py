"""Multi-head parallel adapter: prefix tuning's sum without its softmax, one bottleneck per attention head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import HiddenMethod
from trimtab.core.site import Base, Site


@dataclass(frozen=True)
class MultiHeadParallel(HiddenMethod):
    """head_i ← head_i + relu(q_i K_iᵀ) V_i, in front of the output projection, q_i the frozen query of the head.

    K (heads, length, size) ~ U(±1/√size), V (heads, length, size) zero: the identity at first. q_i is W_q x as it comes
    out of its projection, before a rotation by position; there is no 1/√size.
    Costs 4·length·width multiplications per token and attention, as a bottleneck of `length`; not mergeable.
    arXiv 2110.04366, "MH PA". The equation is the paper's; its code puts a trained layer norm in front of W_q. A linear
    named by its path takes its own input for the query of one head.
    """

    paper: ClassVar[str] = "2110.04366"
    where: ClassVar[str] = "o"
    hosts: ClassVar[frozenset[str]] = frozenset({"linear"})
    learning_rate: ClassVar[float] = 1e-3  # as Houlsby's: a bottleneck without a scale
    source: ClassVar[str] = "q"
    laws: ClassVar[dict[str, str]] = {"merge": "the ReLU between K and V"}

    length: int = 16

    def init(self, site: Site) -> dict[str, Any]:
        heads = (site.heads or 1) if site.role in ("o", "cross.o") else 1
        if site.in_features % heads:
            raise UserError(
                f"MultiHeadParallel: {site.name} has {site.in_features} inputs, not a multiple of {heads} heads",
                fix='where="o", the output projections of attentions',
            )
        size = site.in_features // heads
        K = torch.empty(heads, self.length, size).uniform_(-1 / math.sqrt(size), 1 / math.sqrt(size))
        return {"K": nn.Parameter(K), "V": nn.Parameter(torch.zeros(heads, self.length, size))}

    def count(self, site: Site) -> int:
        return 2 * self.length * site.in_features

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        q = x if base.batch is None else base.batch.sources.get("q", x)
        q = q.unflatten(-1, (p.K.shape[0], -1)).transpose(-3, -2)  # (..., heads, positions, size)
        change = F.relu(q @ p.K.mT) @ p.V
        return base(x + change.transpose(-3, -2).flatten(-2))
