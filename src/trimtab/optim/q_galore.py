"""Q-GaLore: GaLore with a projection of four bits that is looked for less and less often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.core.format import Format
from trimtab.core.registry import find
from trimtab.core.transform import COUNTER, State, Transform, counter, named, within, zeros
from trimtab.optim import _sides as sides

GROUP = 256


@dataclass(frozen=True)
class QGaLore(Transform):
    """u = scale·Q inner(Qᵀ G), with Q the leading singular vectors of G in 4 bits, taken anew after `gap` steps.

    At each new Q the cosine between its first direction and the old one's is noted (its size: the sign of a singular
    vector means nothing). When the last `recent` of them are `similar` in the mean, the gap of that matrix doubles.
    Sides, and what goes to `inner` unprojected, are as in `GaLore`.
    State of an (m, n) matrix with m ≤ n: Q as codes and fp32 scale and zero per 256 values, 0.53·m·rank bytes, and
    inner's state of (rank, n): 2.03·rank·n for 8-bit Adam; 24 + 4·recent for what decides the next search. Costs
    GaLore's multiplications, a decoding of Q per step, and an SVD that becomes rare.
    arXiv 2407.08296. Its weights of 8 bits with stochastic rounding are the method `full_int8`, and the preset
    `fullqgalore` is both, a layer at a time. The official code takes the cosine with its sign.
    """

    paper: ClassVar[str] = "2407.08296"

    inner: str | Transform = "adam8"
    rank: int = 128
    gap: int = 200
    scale: float = 1.0
    similar: float = 0.4
    recent: int = 5

    def __post_init__(self) -> None:
        within(self, "recent", 1, float("inf"))
        sides.checked(self)

    @property
    def inners(self) -> tuple[Transform, ...]:
        return (named(self.inner),)

    def init(self, p: Tensor) -> State:
        if not sides.projects(p.shape, self.rank):
            return {"inner": self.inners[0].init(p)}
        R = zeros(p, *sides.reduced(p.shape, self.rank))
        Q = quartered(zeros(p, min(p.shape), self.rank))
        cosines = torch.full((self.recent,), -1.0, dtype=torch.float32, device="cpu")
        return {"t": counter(), "next": counter(), "gap": counter() + self.gap, "cosines": cosines, "Q": Q} | {
            "inner": self.inners[0].init(R)
        }

    def update(self, g: Tensor, s: State, p: Tensor) -> Tensor:
        if "Q" not in s:
            return self.inners[0].update(g, s["inner"], p)
        if int(s["t"]) == int(s["next"]):
            self.search(g, s)
        s["t"] += 1
        Q = whole(s["Q"], min(g.shape), self.rank).to(g.dtype)
        R = sides.project(g, Q)
        return self.scale * sides.back(self.inners[0].update(R, s["inner"], R), Q, g.shape)

    def search(self, g: Tensor, s: State) -> None:
        """Take new directions, and double the gap where they are much like the old ones."""
        P, old = sides.directions(g, self.rank), whole(s["Q"], min(g.shape), self.rank)[:, 0]
        if int(s["t"]):
            cosine = F.cosine_similarity(P[:, 0].float(), old, dim=0).abs()
            s["cosines"].copy_(torch.cat([s["cosines"][1:], cosine.cpu().view(1)]))
            if bool((s["cosines"] >= 0).all()) and float(s["cosines"].mean()) >= self.similar:
                s["gap"] *= 2
        s["next"].copy_(s["t"] + s["gap"])
        for key, value in quartered(P).items():
            s["Q"][key].copy_(value)

    def state_bytes(self, shape: Sequence[int]) -> int:
        if not sides.projects(shape, self.rank):
            return self.inners[0].state_bytes(shape)
        groups = -(-min(shape) * self.rank // GROUP)
        inner = self.inners[0].state_bytes(sides.reduced(shape, self.rank))
        return groups * (GROUP // 2 + 8) + inner + 3 * COUNTER + 4 * self.recent


@cache
def four_bits() -> Format:
    made: Format = find("affine", "storage")(code_bits=4, group_size=GROUP)
    return made


def quartered(P: Tensor) -> State:
    """P in groups of 256 values, the last one filled up."""
    flat = P.float().flatten()
    return four_bits().encode(F.pad(flat, (0, -len(flat) % GROUP)).view(-1, GROUP))


def whole(code: State, side: int, rank: int) -> Tensor:
    """The (side, rank) matrix that codes stand for."""
    count = side * rank
    return four_bits().decode(code, (-(-count // GROUP), GROUP)).flatten()[:count].view(side, rank)
