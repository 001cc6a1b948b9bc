"""What a tuned adapter did to each weight: how much of it is length and how much direction, and in which directions.

With W (out, in) the base weight, W' the tuned one, D = W' − W = U S Vᵀ and w_n, w'_n the rows:

    ΔM = 1/out Σ_n | ‖w'_n‖ − ‖w_n‖ |          ΔD = 1/out Σ_n (1 − cos(w'_n, w_n))           DoRA, arXiv 2402.09353
    effective rank = exp(−Σ q_i ln q_i), q = S / Σ S;    stable rank = Σ S² / S₁²
    amplification at r = ‖D‖ / ‖U_rᵀ W V_r‖;   overlap at r = ‖U_rᵀ U_W,r‖² / r         LoRA, arXiv 2106.09685 §7.3

Lengths are of output rows, as in the method `magnitude`. Amplification tells how much stronger the update is than what
the base has in its directions; overlap how far they are the base's own strongest ones. By the correlation of ΔM and
ΔD over sites the DoRA paper tells full fine-tuning (negative) from LoRA (positive).

Cost: one weight at a time in float64, an SVD of its change, and one of the weight for the overlap (exact up to
`EXACT` rows or columns, else randomized, seeded). A stack of experts is taken matrix by matrix and averaged. Errors:
`UserError` where the adapter changes no weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.delta import Delta
from trimtab.core.draw import site_at
from trimtab.core.errors import UserError, listing
from trimtab.core.places import Place
from trimtab.core.save import deltas_of
from trimtab.core.state import State, check_names, require_state
from trimtab.interop.to_lora import CUT, difference, overlapping

EXACT = 2048
"""The smaller side up to which a weight's own singular vectors are worked out exactly."""
TOLD = 16
"""Singular values that are told of each site."""


@dataclass(frozen=True)
class Change:
    """One site. Shares are of ‖D‖²; None where the site did not change."""

    site: str
    role: str | None
    layer: int | None
    shape: tuple[int, ...]
    magnitude: float
    """ΔM."""
    direction: float
    """ΔD."""
    relative: float
    """‖D‖ / ‖W‖."""
    rank: int
    """Singular values above 1e-6 of the largest."""
    effective_rank: float
    stable_rank: float
    singular_values: tuple[float, ...]
    energy_at: dict[int, float]
    """Share of ‖D‖² in the first 1, 2, 4, 8, ... singular values."""
    at: int
    """The r of the two below: the stable rank rounded up."""
    amplification: float | None
    overlap: float | None


@dataclass(frozen=True)
class Analysis:
    """All sites, and the correlation of ΔM and ΔD: over those of the model's layers, and over those of each role."""

    adapter: str
    changes: tuple[Change, ...]
    correlation: float | None
    by_role: dict[str, float | None]


@torch.no_grad()
def analyse(
    model: nn.Module,
    name: str = "default",
    *,
    overlap: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Analysis:
    """What the attached adapter `name` changes, site by site; the model stays as it is.

    `overlap=False` leaves out the SVD of the weights themselves. See the head of this file for what is told.
    """
    state = require_state(model, "analyze")
    check_names(state, [name], "analyze")
    sites: dict[str, list[tuple[Place, Delta]]] = {}
    for part in state.adapters[name].parts:
        if not part.method.mergeable:
            reason = part.method.laws.get("merge", "it changes no weight")
            raise UserError(
                f"analyze: {type(part.method).__name__} has no change of weights to look at: {reason}",
                fix="a run of a method that merges, see `trimtab methods`",
            )
        for place, delta in zip(part.places, deltas_of(model, state, name, part), strict=True):
            if place.kind != "norm":
                sites.setdefault(place.name, []).append((place, delta))
    overlapping(sites)
    if not sites:
        raise UserError("analyze: only norms were trained, which have no singular values", fix="another run")
    changes = []
    for done, members in enumerate(sites.values(), 1):
        place = members[0][0]
        W = site_at(model, State(), place).base.weight.detach().double().cpu()
        D = difference(model, place, [delta for _, delta in members])[0].cpu()
        changes.append(change_of(place, W, D, overlap))
        progress(done, len(sites))
    roles = sorted({one.role for one in changes if one.role})
    by_role = {role: correlation(one for one in changes if one.role == role) for role in roles}
    inside = [one for one in changes if one.layer is not None] or changes  # a new head learns on another scale
    return Analysis(name, tuple(changes), correlation(inside), by_role)


def change_of(place: Place, W: Tensor, D: Tensor, overlap: bool) -> Change:
    """The figures of one site; of a stack the means over its matrices."""
    pairs = list(zip(W.reshape(-1, *W.shape[-2:]), D.reshape(-1, *D.shape[-2:]), strict=True)) if W.ndim > 1 else []
    if not pairs:
        raise UserError(f"analyze: {place.name} is no matrix", fix="another run")
    found = [figures(one, change, overlap) for one, change in pairs]
    counts = [2**power for power in range(1 + int(math.log2(min(W.shape[-2:]))))]
    return Change(
        site=place.name,
        role=place.role,
        layer=place.layer,
        shape=tuple(W.shape),
        magnitude=mean(one["magnitude"] for one in found),
        direction=mean(one["direction"] for one in found),
        relative=float(D.norm() / W.norm()),
        rank=max(one["rank"] for one in found),
        effective_rank=mean(one["effective_rank"] for one in found),
        stable_rank=mean(one["stable_rank"] for one in found),
        singular_values=tuple(found[0]["S"][:TOLD].tolist()),
        energy_at={count: mean(energy(one["S"], count) for one in found) for count in counts},
        at=max(one["at"] for one in found),
        amplification=mean_of([one["amplification"] for one in found]),
        overlap=mean_of([one["overlap"] for one in found]),
    )


def figures(W: Tensor, D: Tensor, overlap: bool) -> dict[str, Any]:
    """The figures of one matrix."""
    magnitude, direction = length_and_direction(W, W + D)
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    total = float(S.sum())
    found: dict[str, Any] = {"magnitude": magnitude, "direction": direction, "S": S, "at": 0, "rank": 0}
    found |= {"effective_rank": 0.0, "stable_rank": 0.0, "amplification": None, "overlap": None}
    if not total:
        return found
    q = S[S > 0] / total
    stable = float(S.square().sum() / S[0] ** 2)
    r = min(math.ceil(stable - 1e-9), len(S))
    inside = float((U[:, :r].mT @ W @ Vh[:r].mT).norm())
    found |= {"rank": int((CUT * S[0] < S).sum()), "effective_rank": float((-(q * q.log()).sum()).exp())}
    found |= {"stable_rank": stable, "at": r, "amplification": float(D.norm()) / inside if inside else None}
    if overlap:
        found["overlap"] = float((U[:, :r].mT @ strongest(W, r)).square().sum()) / r
    return found


def length_and_direction(W: Tensor, tuned: Tensor) -> tuple[float, float]:
    """ΔM and ΔD of two matrices (out, in); a row of zeros has no direction and counts as unchanged."""
    before, after = W.norm(dim=1), tuned.norm(dim=1)
    cosine = (W * tuned).sum(1) / (before * after)
    cosine = torch.where((before > 0) & (after > 0), cosine, torch.ones_like(cosine))
    return float((after - before).abs().mean()), float((1 - cosine).mean())


def strongest(W: Tensor, r: int) -> Tensor:
    """The first r left singular vectors of a weight."""
    if min(W.shape) <= EXACT:
        return torch.linalg.svd(W, full_matrices=False)[0][:, :r]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.svd_lowrank(W, q=r + 16, niter=4)[0][:, :r]


def energy(S: Tensor, count: int) -> float:
    """Share of the squares in the first singular values, 0 of a site that did not change."""
    total = float(S.square().sum())
    return float(S[:count].square().sum()) / total if total else 0.0


def correlation(changes: Iterable[Change]) -> float | None:
    """Pearson's r of ΔM and ΔD over sites; None for fewer than three, or where one of them does not vary."""
    pairs = torch.tensor([(one.magnitude, one.direction) for one in changes], dtype=torch.float64)
    if len(pairs) < 3 or bool((pairs.std(0) == 0).any()):
        return None
    return float(torch.corrcoef(pairs.mT)[0, 1])


def mean(values: Iterable[float]) -> float:
    """The mean."""
    listed = list(values)
    return sum(listed) / len(listed)


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean of those that are there."""
    known = [one for one in values if one is not None]
    return mean(known) if known else None


def described(analysis: Analysis) -> str:
    """The correlation in words, as the paper reads it."""
    r = analysis.correlation
    if r is None:
        return "ΔM and ΔD: too few sites that changed for a correlation"
    word = "negative, as of full fine-tuning and DoRA" if r < 0 else "positive, as of LoRA"
    roles = [f"{role} {value:+.2f}" for role, value in analysis.by_role.items() if value is not None]
    return f"ΔM and ΔD over sites: r = {r:+.2f} ({word}, in the DoRA paper)" + (f"; {listing(roles)}" if roles else "")
