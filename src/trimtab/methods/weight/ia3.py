"""IA3: learned rescaling of keys, values and the inner activations of the feed-forward layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.low_rank import matches
from trimtab.core.method import WeightMethod
from trimtab.core.site import Base, Site


@dataclass(frozen=True)
class IA3(WeightMethod):
    """k ← l_k ∘ k, v ← l_v ∘ v, and FFN: W₂ (l_ff ∘ γ(W₁ x)); so W' = diag(l) W, or W diag(l) at `down`.

    l (out), or (in) at the `down` projection, whose input is γ(W₁ x); all ones at the start. `inputs` names the sites
    whose input is scaled, by role or glob. One multiplication per channel and token; nothing after merging. Mergeable.
    arXiv 2205.05638. It wants a learning rate 10 to 30 times LoRA's, and no weight decay towards zero.
    """

    paper: ClassVar[str] = "2205.05638"
    where: ClassVar[str] = "k, v, down"
    learning_rate: ClassVar[float] = 1e-2

    inputs: str = "down"

    def init(self, site: Site) -> dict[str, Any]:
        if self.scales_input(site):
            return {"l_in": nn.Parameter(torch.ones(site.in_features))}
        return {"l": nn.Parameter(torch.ones(site.out_features))}

    def scales_input(self, site: Site) -> bool:
        return any(matches(glob.strip(), site) for glob in self.inputs.split(",") if glob.strip())

    def count(self, site: Site) -> int:
        return site.in_features if self.scales_input(site) else site.out_features

    def weight(self, W: Tensor, p: Any) -> Tensor:
        return W * p.l_in if hasattr(p, "l_in") else p.l[:, None] * W

    def bias(self, b: Tensor | None, p: Any) -> Tensor | None:
        return b if b is None or hasattr(p, "l_in") else p.l * b

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        return base(x * p.l_in) if hasattr(p, "l_in") else p.l * base(x)
