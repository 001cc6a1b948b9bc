"""LN-tuning: only the gains (and offsets) of the normalization layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.method import WeightMethod
from trimtab.core.site import Site


@dataclass(frozen=True)
class LNTuning(WeightMethod):
    """γ' = γ + g, β' = β + d for y = γ ∘ normalize(x) + β.

    A norm's gain is a weight (out, 1): g (out, 1) and d (out, only where there is a β) start at 0. No cost at run time.
    Mergeable.
    arXiv 2312.11420. Trained as offsets, so weight decay pulls towards the pretrained values; kept in fp32 by `tune`,
    since next to γ ≈ 1 a small step vanishes in bf16.
    """

    paper: ClassVar[str] = "2312.11420"
    where: ClassVar[str] = "norm"
    hosts: ClassVar[frozenset[str]] = frozenset({"norm"})
    learning_rate: ClassVar[float] = 3e-3

    def init(self, site: Site) -> dict[str, Any]:
        g = {"g": nn.Parameter(torch.zeros(site.out_features, 1))}
        return g if site.base.bias is None else g | {"d": nn.Parameter(torch.zeros(site.out_features))}

    def count(self, site: Site) -> int:
        return site.out_features * (1 if site.base.bias is None else 2)

    def weight(self, W: Tensor, p: Any) -> Tensor:
        return W + p.g

    def bias(self, b: Tensor | None, p: Any) -> Tensor | None:
        return b if b is None else b + p.d
