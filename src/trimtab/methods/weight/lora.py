"""LoRA: low-rank adaptation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError, listing
from trimtab.core.low_rank import LowRank, by_site, pattern, unmatched
from trimtab.core.site import Site


@dataclass(frozen=True)
class LoRA(LowRank):
    """W' = W + s·B A, with s = alpha / rank^rank_power.

    A (rank, in) reads `rank` directions of the input, B (out, rank) writes them to the output; W stays frozen.
    A ~ U(±1/√in) and B = 0 (`start="A"`), or B random and A = 0 (`start="B"`); an embedding starts from B ~ N(0, 1) and
    A = 0, since its input is one-hot. Dropout is on the branch's input only. `ranks` and `alphas` set other values by
    role or glob of a site's name, the first match counts: `ranks="q=16, *.mlp.*=4"`.
    Costs 2·rank·(in + out) multiplications per token; nothing after merging. Mergeable.
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
    start: str = "A"
    rank_power: float = 1.0
    ranks: str = ""
    alphas: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start not in ("A", "B"):
            raise UserError(f"LoRA: start={self.start!r} names no factor", fix='start="A" (B is zero) or start="B"')
        odd = [f"{glob}={value:g}" for glob, value in pattern(self.ranks) if value != int(value)]
        if odd:
            raise UserError(f"LoRA: ranks are whole numbers, found {listing(odd)}")
        pattern(self.alphas)

    @property
    def scale(self) -> float:
        """s where no pattern says otherwise."""
        return self.alpha / self.rank**self.rank_power

    def shared(self, sites: Sequence[Site]) -> dict[str, Any]:
        lost = unmatched(self.ranks, sites) + unmatched(self.alphas, sites)
        if lost:
            raise UserError(f"LoRA: no site is meant by {listing(lost)}", fix=f"sites are {sites[0].name}, ...")
        return {}

    def init(self, site: Site) -> dict[str, Any]:
        rank = self.rank_at(site)
        A = torch.zeros(rank, site.in_features)
        B = torch.zeros(site.out_features, rank)
        if site.kind == "embedding":
            nn.init.normal_(B)
        else:
            nn.init.kaiming_uniform_(A if self.start == "A" else B, a=math.sqrt(5))
        p: dict[str, Any] = {"A": nn.Parameter(A), "B": nn.Parameter(B)}
        return p | {"alpha": torch.tensor(by_site(self.alphas, site, self.alpha))} if self.alphas else p

    def rank_at(self, site: Site) -> int:
        return int(by_site(self.ranks, site, self.rank))

    def count(self, site: Site) -> int:
        return self.rank_at(site) * (site.in_features + site.out_features)

    def factors(self, p: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        alpha = p.alpha if self.alphas else self.alpha
        return (alpha / p.A.shape[0] ** self.rank_power) * p.B, p.A
