"""Parallel adapter: a bottleneck beside a sub-layer, on the same input; scaled, it is half of MAM."""

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
class Parallel(HiddenMethod):
    """f ← f + scale·(U relu(D x + d) + u), f the output of a sub-layer and x the residual stream it takes in.

    In pre-norm models x is the stream before the sub-layer's norm; a module named by its path, or a block, reads its
    own input. D (bottleneck, in) ~ U(±1/√in), U (out, bottleneck), d and u zero: the identity at first.
    Costs 2·bottleneck·(in + out) multiplications per token and site, with no added depth; not mergeable.
    arXiv 2110.04366. `scale` is 4 for long outputs and 2 on GLUE in the paper; 1 is its plain parallel adapter, which
    the code draws with std 0.02 instead. Its dropout inside the bottleneck is not made.
    """

    paper: ClassVar[str] = "2110.04366"
    where: ClassVar[str] = "ffn"
    learning_rate: ClassVar[float] = 2e-4  # the paper's: 1e-4 at scale 2, 5e-5 at scale 4 with a bottleneck of 512
    width_power: ClassVar[float] = 1.0
    source: ClassVar[str] = "stream"
    laws: ClassVar[dict[str, str]] = {"merge": "the ReLU between D and U"}

    bottleneck: int = 64
    scale: float = 4.0

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise UserError(f"Parallel: scale={self.scale!r} is not above 0", fix="4, 2 or 1")

    def width(self, site: Site) -> int:
        """Width of x: of the residual stream, or at a path of the module's own input."""
        return site.features or site.in_features

    def init(self, site: Site) -> dict[str, Any]:
        D = nn.init.kaiming_uniform_(torch.empty(self.bottleneck, self.width(site)), a=math.sqrt(5))
        return {
            "D": nn.Parameter(D),
            "d": nn.Parameter(torch.zeros(self.bottleneck)),
            "U": nn.Parameter(torch.zeros(site.out_features, self.bottleneck)),
            "u": nn.Parameter(torch.zeros(site.out_features)),
        }

    def count(self, site: Site) -> int:
        return self.bottleneck * (self.width(site) + site.out_features + 1) + site.out_features

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        f = base(x)
        h = x if base.batch is None else base.batch.sources.get("stream", x)
        return f + self.scale * F.linear(F.relu(F.linear(h, p.D, p.d)), p.U, p.u)
