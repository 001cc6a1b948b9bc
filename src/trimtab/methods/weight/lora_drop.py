"""LoRA-drop: the sites where LoRA does most keep their own, all others share one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.low_rank import LowRank, key_of
from trimtab.core.method import dropout
from trimtab.core.site import Base, Site


@dataclass(frozen=True)
class LoRADrop(LowRank):
    """W' = W + s·B A at important sites, W' = W + s·B_s A_s with one shared pair at all others; s = alpha / rank.

    Up to step `measure` every site trains a LoRA of its own and adds up g = Σ_x ‖s·B A x‖², what its LoRA puts out. At
    the next step the sites of the largest share g / Σg keep their own pair until these shares make up `keep`; all own
    pairs are begun anew and the other sites change over to the shared pair of their shape.
    A (rank, in) and A_s ~ U(±1/√in), B (out, rank) and B_s = 0; `own` is 1, and 0 at a site that shares.
    Costs 2·rank·(in + out) multiplications per token; nothing after merging. Mergeable.
    arXiv 2402.07721. The paper measures on a tenth of the data after a short training on it, here the training's first
    steps are both; its sites have one shape, others share by shape. A weight that is read raw is not measured and keeps
    its own. (An unrelated method for inference has the same name.)
    """

    paper: ClassVar[str] = "2402.07721"
    learning_rate: ClassVar[float] = 1.5e-3
    width_power: ClassVar[float] = 1.0
    own_rows: ClassVar[bool] = True
    laws: ClassVar[Mapping[str, str]] = {
        "trains_only": "the shared pair waits for the second stage",
        "distributed": "each process scores the sites by its own rows only",
    }

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    measure: int = 100
    keep: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.measure < 1 or not 0 <= self.keep <= 1:
            raise UserError(
                f"LoRADrop: measure={self.measure}, keep={self.keep}", fix="measure of 1 or more, keep from 0 to 1"
            )

    def shared(self, sites: Sequence[Site]) -> dict[str, Any]:
        """A pair for each shape; `key` (sites) tells a site which of the `scores` (sites) is its own."""
        key = torch.tensor([key_of(site) for site in sites])
        p: dict[str, Any] = {"key": key, "scores": torch.zeros(len(sites), dtype=torch.int32)}
        for out, into in shapes(sites):
            p[f"A_{out}_{into}"] = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(self.rank, into), a=math.sqrt(5)))
            p[f"B_{out}_{into}"] = nn.Parameter(torch.zeros(out, self.rank))
        return p

    def count_shared(self, sites: Sequence[Site]) -> int:
        return sum(self.rank * (out + into) for out, into in shapes(sites))

    def init(self, site: Site) -> dict[str, Any]:
        A = nn.init.kaiming_uniform_(torch.empty(self.rank, site.in_features), a=math.sqrt(5))
        state = {"own": torch.ones(()), "measuring": torch.ones(()), "g": torch.zeros((), dtype=torch.int32)}
        pair = {"A": nn.Parameter(A), "B": nn.Parameter(torch.zeros(site.out_features, self.rank))}
        return {**pair, **state, "key": torch.tensor(key_of(site)), "seed": torch.randint(2**62, ())}

    def count(self, site: Site) -> int:
        return self.rank * (site.in_features + site.out_features)

    def factors(self, p: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        A_s, B_s = (getattr(p.shared, f"{letter}_{shape[-2]}_{shape[-1]}") for letter in "AB")
        B, A = torch.lerp(B_s, p.B, p.own.to(p.B)), torch.lerp(A_s, p.A, p.own.to(p.A))
        return (self.alpha / self.rank) * B, A

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        if not p.training:
            return super().forward(x, base, p)
        B, A = self.factors(p, base.shape)
        low = base.affine(dropout(x, self.dropout, p), A)
        with torch.no_grad():
            seen = low.flatten(0, -2)
            norm = ((seen.mT @ seen) * (B.mT @ B)).sum()  # Σ ‖B low‖² without the outputs
            sums(p.g).add_((p.measuring * norm).float())
        return base(x) + low @ B.mT

    @torch.no_grad()
    def on_step(self, p: Any, step: int) -> None:
        row = int((p.shared.key == p.key.flatten()[0]).nonzero()[0, 0])
        if step == self.measure:
            sums(p.shared.scores)[row] = sums(p.g).sum()
            p.measuring.zero_()
        if step == self.measure + 1:
            if p.g.any() and not kept(sums(p.shared.scores), self.keep)[row]:
                p.own.zero_()
            generator = torch.Generator().manual_seed(int(p.seed.flatten()[0]))
            drawn = torch.rand(p.A.shape, generator=generator, device="cpu")
            p.A.copy_((2 * drawn - 1) / math.sqrt(p.A.shape[-1]))
            p.B.zero_()

    def stale(self, p: Any, step: int) -> list[Tensor]:
        return [p.A, p.B] if step == self.measure + 1 else []


def shapes(sites: Sequence[Site]) -> list[tuple[int, int]]:
    """Every (out, in) once."""
    return list(dict.fromkeys((site.out_features, site.in_features) for site in sites))


def sums(stored: Tensor) -> Tensor:
    """fp32 sums that are stored as integers: those stay as they are where tensors are cast to a narrower type."""
    return stored.view(torch.float32)


def kept(scores: Tensor, share: float) -> Tensor:
    """(sites) bool: the largest scores, until they make up this share of all."""
    order = scores.argsort(descending=True)
    part = scores[order] / scores.sum().clamp(min=torch.finfo(scores.dtype).tiny)
    found = torch.zeros_like(scores, dtype=torch.bool)
    found[order] = part.cumsum(0) - part < share
    return found
