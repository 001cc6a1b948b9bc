"""BitFit: train the biases a model has, and nothing else."""

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
class BitFit(WeightMethod):
    """b' = b + d, W' = W, wherever there is a bias b: at linears, convolutions and norms.

    d (out) starts at 0; as an offset, so that weight decay pulls towards the pretrained value. Sites without a bias are
    passed over, and a model without any is refused: `OutputBias` adds some. One addition per channel, no input of a
    layer is kept for backward; nothing after merging. Mergeable, also where W is quantized, exactly.
    arXiv 2106.10199. All biases by default; the paper's smaller set, those of queries and of the first feed-forward
    layer, is `where="q, up"`. A new head trains beside it as a part of its own. The official code trains b itself.
    """

    paper: ClassVar[str] = "2106.10199"
    where: ClassVar[str] = "all"
    hosts: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "norm"})
    learning_rate: ClassVar[float] = 1e-3
    """The official code's; biases are vectors, whose best rate hardly depends on the width."""
    on_bias: ClassVar[bool] = True

    def init(self, site: Site) -> dict[str, Any]:
        return {"d": nn.Parameter(torch.zeros(site.out_features))}

    def count(self, site: Site) -> int:
        return site.out_features

    def bias(self, b: Tensor | None, p: Any) -> Tensor | None:
        return b if b is None else b + p.d

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        return base(x) + p.d

    def merge(self, code: Code, p: Any) -> dict[str, Tensor] | None:
        return {}
