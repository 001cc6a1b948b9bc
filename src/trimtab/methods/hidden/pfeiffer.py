"""Pfeiffer adapter: one bottleneck a layer, behind the feed-forward, on what the frozen norm makes of the sum."""

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
class Pfeiffer(HiddenMethod):
    """h ← N(s + U relu(D N(s) + d) + u), s = f + x the sum of feed-forward and residual, N the frozen norm behind it.

    Where a norm follows the addition (post-norm: BERT) that norm is the site, and runs twice; where none does
    (pre-norm: Llama) N is the identity and s the output of the block. The skip is s itself, from before the norm.
    D (bottleneck, width), U (width, bottleneck) ~ N(0, 0.02²), d and u zero: nearly the identity at first.
    Costs 4·bottleneck·width multiplications per token and layer, also at inference: not mergeable.
    arXiv 2005.00247; it takes width / 16 as the bottleneck. `activation` may be gelu or silu instead of ReLU. In a
    model that scales a sub-layer's output before the addition (Granite) the adapter is not scaled. "Pfeiffer" in
    Compacter's code, behind the attention, is another.
    """

    paper: ClassVar[str] = "2005.00247"
    where: ClassVar[str] = "stream"
    learning_rate: ClassVar[float] = 5e-4  # AdapterHub's 1e-4 is for many epochs; Houlsby's two at 1e-3 move as far
    laws: ClassVar[dict[str, str]] = {
        "merge": "the ReLU between D and U",
        "identity": "D and U are both drawn with std 0.02, as in AdapterHub",
    }

    bottleneck: int = 48
    activation: str = "relu"

    def __post_init__(self) -> None:
        check_activation(self, self.activation)

    def init(self, site: Site) -> dict[str, Any]:
        n, m = site.out_features, self.bottleneck
        tensors: dict[str, Any] = {
            "D": nn.Parameter(0.02 * torch.randn(m, n)),
            "d": nn.Parameter(torch.zeros(m)),
            "U": nn.Parameter(0.02 * torch.randn(n, m)),
            "u": nn.Parameter(torch.zeros(n)),
        }
        return tensors | ({"behind_norm": torch.ones(())} if site.role == "stream" else {})

    def count(self, site: Site) -> int:
        return 2 * site.out_features * self.bottleneck + self.bottleneck + site.out_features

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        z = base(x)
        change = F.linear(activated(self.activation, F.linear(z, p.D, p.d)), p.U, p.u)
        return base(x + change) if hasattr(p, "behind_norm") else z + change
