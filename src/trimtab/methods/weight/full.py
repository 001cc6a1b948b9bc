"""Full: a dense trained copy of the weight; for heads, embeddings, and as the reference of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from trimtab.core.method import WeightMethod
from trimtab.core.site import Base, Site


@dataclass(frozen=True)
class Full(WeightMethod):
    """W' = V and b' = c, both trained.

    V (out, in) and c (out, where there is a bias) start as copies of W and b. Trains everything at its sites: as many
    gradients and optimizer states as weights. Mergeable (V replaces W).
    """

    hosts: ClassVar[frozenset[str]] = frozenset({"linear", "embedding", "conv", "norm"})
    learning_rate: ClassVar[float] = 4e-5
    width_power: ClassVar[float] = 1.0
    replaces: ClassVar[bool] = True

    def init(self, site: Site) -> dict[str, Any]:
        b = site.base.bias
        V = {"V": nn.Parameter(site.base.weight.detach().clone())}
        return V if b is None else V | {"c": nn.Parameter(b.detach().clone())}

    def count(self, site: Site) -> int:
        return site.out_features * (site.in_features + (site.base.bias is not None))

    def weight(self, W: Tensor, p: Any) -> Tensor:
        return p.V

    def bias(self, b: Tensor | None, p: Any) -> Tensor | None:
        return b if b is None else p.c

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        return base.affine(x, p.V, self.bias(base.bias, p))
