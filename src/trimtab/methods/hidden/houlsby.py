"""Houlsby adapter: a bottleneck with a skip, in series after both sub-layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.activation import activated, check_activation
from trimtab.core.method import HiddenMethod
from trimtab.core.site import Base, Site


@dataclass(frozen=True)
class Houlsby(HiddenMethod):
    """h ← h + U g(D h + d) + u, with g = GELU, on the output of a sub-layer before the residual sum.

    D (bottleneck, width), U (width, bottleneck) ~ truncated N(0, 1e-2²), d and u zero: nearly the identity at first.
    Costs 4·bottleneck·width multiplications per token and site, also at inference: not mergeable.
    arXiv 1902.00751; the std is the paper's (its code has 1e-3). `activation` may be relu or silu instead, as
    AdapterHub has it. The paper also trains the layer norms: put `LNTuning()` beside it.
    """

    paper: ClassVar[str] = "1902.00751"
    where: ClassVar[str] = "attn, ffn"
    learning_rate: ClassVar[float] = 1e-3
    laws: ClassVar[dict[str, str]] = {
        "merge": "the GELU between D and U",
        "identity": "U is drawn with std 1e-2, so the first output is nearly, not exactly, the frozen one",
    }

    bottleneck: int = 64
    activation: str = "gelu"

    def __post_init__(self) -> None:
        check_activation(self, self.activation)

    def init(self, site: Site) -> dict[str, Any]:
        d, m = site.out_features, self.bottleneck

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=1e-2, a=-2e-2, b=2e-2))

        return {
            "D": drawn(m, d),
            "d": nn.Parameter(torch.zeros(m)),
            "U": drawn(d, m),
            "u": nn.Parameter(torch.zeros(d)),
        }

    def count(self, site: Site) -> int:
        return 2 * site.out_features * self.bottleneck + self.bottleneck + site.out_features

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        h = base(x)
        return h + F.linear(activated(self.activation, F.linear(h, p.D, p.d)), p.U, p.u)
