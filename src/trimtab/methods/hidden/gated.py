"""Gated: what another method changes, weighted token by token by a trained gate; the mixer of UniPELT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import HiddenMethod, Method
from trimtab.core.registry import find
from trimtab.core.site import Base, Known, Site


@dataclass(frozen=True)
class Gated(HiddenMethod):
    """y = h + σ(w·z + c)·(inner(x) − h), with h the frozen output and z what the inner method works on.

    z is the site's input x for a method that edits a weight, its output h for one that edits activations. w (1, in or
    out) ~ N(0, 0.02²) and c (1) zero beside the inner method's tensors: gates start half open.
    Costs what the inner method costs and a product of the width per token. Not mergeable, whatever the inner method is.
    arXiv 2110.07577. Its code averages the gate over the positions of a row, which lets a token see later ones; here
    every token has its own.
    """

    paper: ClassVar[str] = "2110.07577"
    where: ClassVar[str] = "ffn"
    source: ClassVar[str] = "stream"
    learning_rate: ClassVar[float] = 2e-4
    width_power: ClassVar[float] = 1.0
    laws: ClassVar[dict[str, str]] = {"merge": "the gate depends on the token"}

    inner: Method = field(default_factory=lambda: find("parallel")())

    def __post_init__(self) -> None:
        if self.inner.space == "input" or self.inner.takes_out:
            why = "starts inside W" if self.inner.takes_out else "gives all tokens the same virtual ones"
            raise UserError(f"Gated: {type(self.inner).__name__} {why}, so no token can gate it", fix="inner=LoRA()")
        for name in ("where", "source", "statistics"):
            self.__dict__[name] = getattr(self.inner, name)
        self.__dict__["hosts"] = self.inner.hosts & {"linear", "opaque"}
        self.__dict__["elastic"] = frozenset(f"inner.{name}" for name in self.inner.elastic)
        self.__dict__["reads_batch"] = getattr(self.inner, "reads_batch", False)
        self.__dict__["laws"] = {**self.inner.laws, "merge": type(self).laws["merge"]}

    def rate(self, width: int) -> float:
        return self.inner.rate(width)

    def shared(self, sites: Sequence[Site]) -> dict[str, Any]:
        return self.inner.shared(sites)

    def count_shared(self, sites: Sequence[Site]) -> int:
        return self.inner.count_shared(sites)

    def width(self, site: Site) -> int:
        """Width of z."""
        return site.in_features if self.inner.space == "weight" else site.out_features

    def init(self, site: Site) -> dict[str, Any]:
        w = 0.02 * torch.randn(1, self.width(site))
        return {"w": nn.Parameter(w), "c": nn.Parameter(torch.zeros(1)), "inner": self.inner.init(site)}

    def count(self, site: Site) -> int:
        return self.width(site) + 1 + self.inner.count(site)

    def on_step(self, p: Any, step: int) -> None:
        self.inner.on_step(p.inner, step)

    def stale(self, p: Any, step: int) -> Sequence[Tensor]:
        return self.inner.stale(p.inner, step)

    def penalty(self, p: Any) -> Tensor | None:
        return self.inner.penalty(p.inner)

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        h = base(x)
        gate = torch.sigmoid(F.linear(x if self.inner.space == "weight" else h, p.w, p.c))
        return h + gate * (self.inner.forward(x, Known(base, None, x, h), p.inner) - h)
