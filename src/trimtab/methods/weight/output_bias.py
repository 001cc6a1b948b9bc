"""Output bias: IA3's additive sibling, one trained offset per output channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.method import WeightMethod
from trimtab.core.site import Base, Site

if TYPE_CHECKING:
    from trimtab.core.code import Code


@dataclass(frozen=True)
class OutputBias(WeightMethod):
    """b' = b + d, W' = W.

    d (out) starts at 0; a site without a bias gets one. One addition per channel; nothing after merging. Mergeable,
    also where W is quantized, exactly.
    arXiv 2106.10199 trains biases that exist; on a model without any this adds zero-initialised ones.
    """

    paper: ClassVar[str] = "2106.10199"
    learning_rate: ClassVar[float] = 3e-3

    def init(self, site: Site) -> dict[str, Any]:
        return {"d": nn.Parameter(torch.zeros(site.out_features))}

    def count(self, site: Site) -> int:
        return site.out_features

    def bias(self, b: Tensor | None, p: Any) -> Tensor | None:
        return p.d if b is None else b + p.d

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        return base(x) + p.d

    def merge(self, code: Code, p: Any) -> dict[str, Tensor] | None:
        return {}
