"""FullInt8: full training of a weight that is kept in eight bits all the while."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.method import WeightMethod
from trimtab.core.rounded import Rounded, rounded_product
from trimtab.core.site import Base, Site


@dataclass(frozen=True)
class FullInt8(WeightMethod):
    """W' = q·scale + low and b' = c, with q (out, in) from 0 to 255; a step writes W' − lr·u, rounded at random.

    scale and low are one for each 256 values, found anew at every step; a value between two codes takes the upper one
    with the probability of its fraction, so that steps far smaller than `scale` count in the mean. q starts as W
    rounded to the nearest, c (out, where there is a bias) as a copy of b. Trains in·out + out values, in 1.03 bytes
    each. The gradient is whole while there is one: `in_backward` holds a layer's at a time. Costs two decodings of W a
    step, and a draw a value. Mergeable (W' replaces W). It trains with trimtab's optimizers and torch's, not compiled.
    arXiv 2407.08296 (Q-GaLore), whose other half is the optimizer `q_galore`; the official code rounds the zero point
    to an integer and clamps it to 0 … 255.
    """

    paper: ClassVar[str] = "2407.08296"
    learning_rate: ClassVar[float] = 4e-5
    width_power: ClassVar[float] = 1.0
    replaces: ClassVar[bool] = True
    stackable: ClassVar[bool] = False
    laws: ClassVar[Mapping[str, str]] = {
        "identity": "weights are rounded from the first pass on",
        "compiles": "codes are written behind the tensor that a graph would hold",
        "distributed": "FSDP2 puts memory of its own in the place of what it cuts; DDP works",
    }

    def init(self, site: Site) -> dict[str, Any]:
        b = site.base.bias
        turn = torch.randint(2**62, (), device=site.base.weight.device)
        V = {"V": Rounded(site.base.weight, turn)}
        return V if b is None else V | {"c": nn.Parameter(b.detach().clone())}

    def count(self, site: Site) -> int:
        return site.out_features * (site.in_features + (site.base.bias is not None))

    def weight(self, W: Tensor, p: Any) -> Tensor:
        V: Tensor = p.V.weight()
        return V.to(W.dtype)

    def bias(self, b: Tensor | None, p: Any) -> Tensor | None:
        return b if b is None else p.c

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        return rounded_product(x, base, p.V, self.bias(base.bias, p))
