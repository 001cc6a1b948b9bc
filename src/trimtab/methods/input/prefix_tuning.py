"""Prefix tuning: trained keys and values in front of every layer's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.activations import started, statistic_of
from trimtab.core.errors import UserError
from trimtab.core.method import InputMethod, Method
from trimtab.core.site import Site


@dataclass(frozen=True)
class PrefixTuning(InputMethod):
    """head = Attn(q, [P_k; k], [P_v; v]), with P = tanh(E Vᵀ + c) Oᵀ + o while training.

    E (length, width) ~ N(0, 1) and V (hidden, width) are shared by all sites, O (out, hidden) and o (out) belong to one
    k or v; with `hidden=None` P (length, out) ~ N(0, 0.02²) is trained directly, and baked that is what is left of the
    network. Trained directly P can also start as the keys and values of the first tokens of training rows
    (`start="rows"`) or of `text` (`start="text"`): a causal model then computes at first what it does with that text in
    front. Adds `length` keys and values to every attention. Not mergeable.
    arXiv 2101.00190, whose authors found the activations of real words the better start, 2110.07602 (direct). P stands
    where k and v come out of their projections, so a rotary model rotates P_k by its position; PEFT stores it rotated
    already.
    """

    paper: ClassVar[str] = "2101.00190"
    where: ClassVar[str] = "k, v"
    hosts: ClassVar[frozenset[str]] = frozenset({"linear"})
    learning_rate: ClassVar[float] = 1e-3

    length: int = 20
    hidden: int | None = 512
    start: str = "random"
    text: str = ""
    tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.length < 1 or (self.hidden is not None and self.hidden < 1):
            problem = f"length={self.length}, hidden={self.hidden}"
            raise UserError(f"PrefixTuning: {problem}", fix="both from 1 on, or hidden=None to train P itself")
        self.__dict__["statistics"] = statistic_of(self)
        if self.start != "random" and self.hidden is not None:
            raise UserError(
                f"PrefixTuning: start={self.start!r} is for a prefix trained directly",
                fix="hidden=None (--hidden none)",
            )

    def rate(self, width: int) -> float:
        return 5 * super().rate(width) if self.hidden is None else super().rate(width)  # P alone starts near 0

    @property
    def virtual_tokens(self) -> int:
        return self.length

    def shared(self, sites: Sequence[Site]) -> dict[str, Any]:
        if self.hidden is None:
            return {}
        width = sites[0].features or sites[0].in_features
        middle = nn.Linear(width, self.hidden)
        return {"E": nn.Parameter(torch.randn(self.length, width)), "V": middle.weight, "c": middle.bias}

    def count_shared(self, sites: Sequence[Site]) -> int:
        width = sites[0].features or sites[0].in_features
        return 0 if self.hidden is None else self.length * width + self.hidden * (width + 1)

    def init(self, site: Site) -> dict[str, Any]:
        if self.hidden is None:
            return {"P": nn.Parameter(started(site, self.length))}
        last = nn.Linear(self.hidden, site.out_features)
        return {"O": last.weight, "o": last.bias}

    def count(self, site: Site) -> int:
        return site.out_features * (self.length if self.hidden is None else self.hidden + 1)

    def virtual(self, p: Any) -> Tensor:
        if self.hidden is None:
            return p.P
        z = p.shared
        return F.linear(torch.tanh(F.linear(z.E, z.V, z.c)), p.O, p.o)

    def bake(self, p: Any) -> tuple[Method, dict[str, Tensor]] | None:
        return None if self.hidden is None else (replace(self, hidden=None), {"P": self.virtual(p)})
