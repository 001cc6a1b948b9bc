"""Lin adapter: a bottleneck with a layer norm of its own at the very end of each block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.method import HiddenMethod
from trimtab.core.site import Base, Site


@dataclass(frozen=True)
class Lin(HiddenMethod):
    """h ← h + U relu(D z + d) + u, with z = γ ∘ (h − mean) / √(variance + 1e-5) + β, on the residual stream.

    γ and β (width) are the adapter's own, one and zero at the start; D (bottleneck, width), U (width, bottleneck) ~
    N(0, 0.02²), d and u zero: nearly the identity at first.
    Costs 4·bottleneck·width multiplications per token and block, also at inference: not mergeable.
    arXiv 2004.03829. The paper also trains task embeddings, its code the whole token embedding: put `Full()` at "embed"
    beside it for that.
    """

    paper: ClassVar[str] = "2004.03829"
    where: ClassVar[str] = "block"
    learning_rate: ClassVar[float] = 1e-3  # the paper's: 5e-4 (translation), 1e-3 (dialogue), 5e-3 (bottleneck of 10)
    laws: ClassVar[dict[str, str]] = {
        "merge": "the norm before D and the ReLU behind it",
        "identity": "D and U are both drawn with std 0.02, as in GPT-2",
    }

    bottleneck: int = 100

    def init(self, site: Site) -> dict[str, Any]:
        n, m = site.out_features, self.bottleneck
        return {
            "gamma": nn.Parameter(torch.ones(n)),
            "beta": nn.Parameter(torch.zeros(n)),
            "D": nn.Parameter(0.02 * torch.randn(m, n)),
            "d": nn.Parameter(torch.zeros(m)),
            "U": nn.Parameter(0.02 * torch.randn(n, m)),
            "u": nn.Parameter(torch.zeros(n)),
        }

    def count(self, site: Site) -> int:
        return 2 * site.out_features * self.bottleneck + self.bottleneck + 3 * site.out_features

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        h = base(x)
        z = F.layer_norm(h, h.shape[-1:], p.gamma, p.beta, eps=1e-5)
        return h + F.linear(F.relu(F.linear(z, p.D, p.d)), p.U, p.u)
