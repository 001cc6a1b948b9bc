"""Magnitude: a trained length per output row over any weight method; over LoRA it is DoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import WeightMethod
from trimtab.core.registry import find
from trimtab.core.site import Base, Site


@dataclass(frozen=True)
class Magnitude(WeightMethod):
    """W' = m ∘ V / ‖V‖, with V = inner.weight(W) and ‖·‖ the norm of each output row (over in).

    m (out) is trained beside the inner method's tensors; it starts at ‖V‖, so W' = W exactly. The norm is a constant in
    backward (the paper's eq. 11). Sites, learning rate, start, measurements and what happens over the steps are the
    inner method's. Costs what the inner method costs, one product W Aᵀ for the norm (LoRA) and one
    multiplication per output. Mergeable; the bias is not scaled.
    arXiv 2402.09353. The official code drops the same x in the frozen term too; here dropout stays in the inner branch.
    """

    paper: ClassVar[str] = "2402.09353"
    hosts: ClassVar[frozenset[str]] = frozenset({"linear", "embedding", "conv"})
    learning_rate: ClassVar[float] = 1.5e-3
    width_power: ClassVar[float] = 1.0

    inner: WeightMethod = field(default_factory=lambda: find("lora")())

    def __post_init__(self) -> None:
        if getattr(self.inner, "space", None) != "weight":
            raise UserError(f"Magnitude: inner={self.inner!r} is no weight method", fix="inner=LoRA(rank=8)")
        for told in ("where", "learning_rate", "width_power", "statistics", "takes_out", "laws"):
            self.__dict__[told] = getattr(self.inner, told)
        self.__dict__["hosts"] = self.inner.hosts & {"linear", "embedding", "conv"}
        self.__dict__["elastic"] = frozenset(f"inner.{name}" for name in self.inner.elastic)

    def init(self, site: Site) -> dict[str, Any]:
        m = torch.linalg.vector_norm(site.base.weight, dim=1)
        return {"m": nn.Parameter(m), "inner": self.inner.init(site)}

    def shared(self, sites: Sequence[Site]) -> dict[str, Any]:
        return self.inner.shared(sites)

    def count(self, site: Site) -> int:
        return site.out_features + self.inner.count(site)

    def count_shared(self, sites: Sequence[Site]) -> int:
        return self.inner.count_shared(sites)

    def rate(self, width: int) -> float:
        return self.inner.rate(width)

    def taken(self, p: Any) -> tuple[Tensor, Tensor] | None:
        return self.inner.taken(p.inner)

    def penalty(self, p: Any) -> Tensor | None:
        return self.inner.penalty(p.inner)

    def on_step(self, p: Any, step: int) -> None:
        self.inner.on_step(p.inner, step)

    def stale(self, p: Any, step: int) -> Sequence[Tensor]:
        return self.inner.stale(p.inner, step)

    def weight(self, W: Tensor, p: Any) -> Tensor:
        V = self.inner.weight(W, p.inner)
        return (p.m / torch.linalg.vector_norm(V, dim=1).detach())[:, None] * V

    def bias(self, b: Tensor | None, p: Any) -> Tensor | None:
        return self.inner.bias(b, p.inner)

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        with torch.no_grad():
            n = self.inner.row_norm(base, p.inner)
        y = self.inner.forward(x, base, p.inner)
        b = self.inner.bias(base.bias, p.inner)
        c = (p.m / n).to(y.dtype)
        return c * y if b is None else torch.addcmul(b - c * b, c, y)
