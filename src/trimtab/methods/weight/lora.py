"""LoRA: low-rank adaptation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.core.errors import UserError, listing
from trimtab.core.low_rank import LowRank, by_site, pattern, unmatched
from trimtab.core.site import Site
from trimtab.core.start import Start, named


@dataclass(frozen=True)
class LoRA(LowRank):
    """W' = W + s·B A, with s = alpha / rank^rank_power.

    A (rank, in) reads `rank` directions of the input, B (out, rank) writes them to the output; W stays frozen.
    A ~ U(±1/√in) and B = 0 (`start="A"`), or B random and A = 0 (`start="B"`); an embedding starts from B ~ N(0, 1) and
    A = 0, since its input is one-hot. Other starts are objects, `start=PiSSA()`: those that begin with a part of W keep
    it as the fixed A0 and B0, W' = W + s·(B A − B0 A0), so W stays as it is (`trimtab.as_lora` makes one product of
    it). Dropout is on the branch's input only. `ranks` and `alphas` set other values by role or glob of a site's name,
    the first match counts: `ranks="q=16, *.mlp.*=4"`.
    Costs 2·rank·(in + out) multiplications per token, twice that with A0 and B0; nothing after merging. Mergeable.
    arXiv 2106.09685; the uniform A is the official code's, the paper says Gaussian. On a fused qkv each slice gets its
    own pair, as in the official code; PEFT shares one pair. Init A against B: arXiv 2406.08447. rsLoRA (`rank_power`
    0.5): arXiv 2312.03732.
    """

    paper: ClassVar[str] = "2106.09685"
    hosts: ClassVar[frozenset[str]] = frozenset({"linear", "embedding", "conv"})
    learning_rate: ClassVar[float] = 1.5e-3
    width_power: ClassVar[float] = 1.0

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    start: str | Start = "A"
    rank_power: float = 1.0
    ranks: str = ""
    alphas: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        odd = [f"{glob}={value:g}" for glob, value in pattern(self.ranks) if value != int(value)]
        if odd:
            raise UserError(f"LoRA: ranks are whole numbers, found {listing(odd)}")
        pattern(self.alphas)
        self.__dict__["takes_out"] = self.begins.takes_out
        self.__dict__["statistics"] = self.begins.statistics
        self.__dict__["laws"] = self.begins.laws
        self.__dict__["elastic"] = frozenset({"A", "B"} if self.begins.elastic else ())

    @cached_property
    def begins(self) -> Start:
        """The start itself, where the setting is its name."""
        return named(self.start)

    @property
    def scale(self) -> float:
        """s where no pattern says otherwise."""
        return self.alpha / self.rank**self.rank_power

    def shared(self, sites: Sequence[Site]) -> dict[str, Any]:
        lost = unmatched(self.ranks, sites) + unmatched(self.alphas, sites)
        if lost:
            raise UserError(f"LoRA: no site is meant by {listing(lost)}", fix=f"sites are {sites[0].name}, ...")
        budget = self.begins.budget(sites, self.rank)
        return {} if budget is None else {"given": budget}

    def init(self, site: Site) -> dict[str, Any]:
        rank, alpha = self.rank_at(site), by_site(self.alphas, site, self.alpha)
        scale = alpha / rank**self.rank_power
        if self.elastic and not site.shared.given.is_meta:
            rank = int(site.shared.given[site.index])
        p = self.begins.begin(site, rank, scale)
        return p | {"alpha": torch.tensor(alpha)} if self.alphas else p

    def rank_at(self, site: Site) -> int:
        return int(by_site(self.ranks, site, self.rank))

    def count(self, site: Site) -> int:
        return self.rank_at(site) * (site.in_features + site.out_features)

    def rate(self, width: int) -> float:
        return float(f"{super().rate(width) * self.begins.rate:.1e}")

    def scale_of(self, p: Any) -> Any:
        """s at one site."""
        rank = self.rank if self.elastic else p.A.shape[-2]
        return (p.alpha if self.alphas else self.alpha) / rank**self.rank_power

    def factors(self, p: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        s = self.scale_of(p)
        if not self.takes_out:
            return s * p.B, p.A
        return s * torch.cat([p.B, -p.B0], -1), torch.cat([p.A, p.A0], -2)

    def taken(self, p: Any) -> tuple[Tensor, Tensor] | None:
        return (self.scale_of(p) * p.B0, p.A0) if self.takes_out else None
