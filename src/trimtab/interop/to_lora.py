"""Any change of weights as a plain LoRA: exact where its rank allows, else the best of a rank or of a share of energy.

For a site with weight W and edited weight W' the change W' − W = U S Vᵀ becomes B = U √S and A = √S Vᵀ, cut behind the
last singular value that is kept. What is lost is measured at every site: ‖W' − W − B A‖ over ‖W' − W‖.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.as_lora import factors_of
from trimtab.core.delta import Delta
from trimtab.core.draw import site_at
from trimtab.core.errors import UserError, listing
from trimtab.core.hosts import is_raw, plain_base, raw_weight
from trimtab.core.low_rank import LowRank
from trimtab.core.places import Place
from trimtab.core.raw import edit_raw
from trimtab.core.registry import find
from trimtab.core.save import deltas_of
from trimtab.core.site import RawBase
from trimtab.core.state import State, check_names, require_state
from trimtab.interop.saved import Draft, Saved, assemble

CUT = 1e-6
"""Singular values below this share of the largest one are rounding."""
WIDEST = 64
"""The rank that is not passed where nobody asks for another."""


@dataclass(frozen=True)
class Fit:
    """How well a LoRA says what a site's change is."""

    site: str
    rank: int
    """The rank of the change itself, by its singular values."""
    kept: int
    error: float
    """‖ΔW − B A‖ / ‖ΔW‖, 0 where the change is 0."""


def to_lora(
    model: nn.Module, name: str = "default", *, rank: int | None = None, energy: float | None = None
) -> tuple[Saved, list[Fit]]:
    """An attached adapter as a saved plain LoRA, and how well it fits at each site; the model stays as it is.

    Singular values are kept up to `rank`, or up to the share `energy` of the sum of their squares; without either, all
    of them up to 64. All sites get the largest rank that one needs, the rest of their factors zero, which is what
    servers take. A trained bias becomes an `output_bias`; norms and single rows of an embedding stay as they are.
    Errors: a method that changes no weight, with its reason.
    """
    state = require_state(model, "convert")
    check_names(state, [name], "convert")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"convert: energy={energy} is no share", fix="above 0, at most 1")
    if rank is not None and rank < 1:
        raise UserError(f"convert: rank={rank}", fix="1 or more")
    adapter = state.adapters[name]
    stuck = [part for part in adapter.parts if not part.method.mergeable]
    if stuck:
        reasons = [f"{type(p.method).__name__}: {p.method.laws.get('merge', 'it changes no weight')}" for p in stuck]
        raise UserError(f"convert: no LoRA computes {listing(reasons)}", fix="keep it as an adapter of ours")
    sites: dict[str, list[tuple[Place, Delta]]] = {}
    kept: list[Draft] = []
    for part in adapter.parts:
        for place, delta in zip(part.places, deltas_of(model, state, name, part), strict=True):
            if place.kind == "norm":
                kept.append(Draft(place, *norm_of(model, place, delta)))
            else:
                sites.setdefault(place.name, []).append((place, delta))
    overlapping(sites)
    found, fits, biases = [], [], []
    limit = rank or (WIDEST if energy is None else None)
    with torch.no_grad():
        for members in sites.values():
            place = members[0][0]
            B, A, d, fit = changed(model, place, [delta for _, delta in members], limit, energy)
            fits.append(fit)
            found.append((place, B, A))
            if d is not None:
                biases.append(Draft(place, find("output_bias")(), {"d": d}))
    pairs = [(place, B, A) for place, B, A in found if A.shape[-2]]
    drafts = padded(pairs)
    if not drafts and not biases and not kept:
        raise UserError("convert: the adapter changes nothing, so there is no LoRA to make of it")
    record = assemble(model, [*drafts, *biases, *kept], name=name, notes={"from": "to_lora"})
    return record, fits


def padded(pairs: Sequence[tuple[Place, Tensor, Tensor]]) -> list[Draft]:
    """Drafts of one LoRA with s = 1: the factors of every site filled with zeros up to the largest rank."""
    if not pairs:
        return []
    rank = max(A.shape[-2] for _, _, A in pairs)
    lora = find("lora")(rank=rank, alpha=float(rank))
    drafts = []
    for place, B, A in pairs:
        more = rank - A.shape[-2]
        wide = {"A": nn.functional.pad(A, (0, 0, 0, more)), "B": nn.functional.pad(B, (0, more))}
        drafts.append(Draft(place, lora, {key: value.contiguous() for key, value in wide.items()}))
    return drafts


def overlapping(sites: dict[str, list[tuple[Place, Delta]]]) -> None:
    """Refuse a whole weight and a part of it in one adapter: their changes would have to be told apart."""
    parts = {place.whole: place.name for members in sites.values() for place, _ in members if place.part is not None}
    both = sorted(set(parts) & set(sites))
    if both:
        raise UserError(f"convert: the adapter is at {listing(both)} and at a part of it", fix="trimtab merge")


def norm_of(model: nn.Module, place: Place, delta: Delta) -> tuple[Any, dict[str, Tensor]]:
    """A trained norm as a copy of its own."""
    W, b = delta.effective(plain_base(model.get_submodule(place.module), place, 0), delta.rows)
    tensors = {"V": W.detach()} if b is None else {"V": W.detach(), "c": b.detach()}
    return find("full")(), {key: value.cpu().clone() for key, value in tensors.items()}


def changed(
    model: nn.Module, place: Place, deltas: Sequence[Delta], limit: int | None, energy: float | None
) -> tuple[Tensor, Tensor, Tensor | None, Fit]:
    """B (out, k), A (k, in) and the change of the bias of one site under these deltas, and how well they fit."""
    base = site_at(model, State(), place).base
    alone = deltas[0]
    exact = len(deltas) == 1 and isinstance(alone.method, LowRank)
    if exact and energy is None and (limit is None or factor_rank(alone, base) <= limit):
        B, A = factors_of(alone, base)
        return B, A, None, Fit(place.name, A.shape[-2], A.shape[-2], 0.0)
    if exact:
        B, A = factors_of(alone, base)
        change, d = B.double() @ A.double(), None
    else:
        change, d = difference(model, place, deltas)
    B, A, full, error = split(change, limit, energy)
    return B.float(), A.float(), d, Fit(place.name, full, A.shape[-2], error)


def difference(model: nn.Module, place: Place, deltas: Sequence[Delta]) -> tuple[Tensor, Tensor | None]:
    """The change of the weight and of the bias of one site, in fp64; None where no bias changes."""
    base, module = site_at(model, State(), place).base, model.get_submodule(place.module)
    W = base.weight.detach().double()
    b = None if base.bias is None else base.bias.detach().double()
    W1, b1 = W, b
    for delta in deltas:
        if is_raw(module, place) and raw_weight(module, place).kind == "experts":
            rows, delta.rows = delta.rows, None  # the base is these rows already
            try:
                W1, b1 = edit_raw(delta, W1, b1, raw_weight(module, place))
            finally:
                delta.rows = rows
        else:
            W1, b1 = delta.effective(RawBase(W1, b1), None)
    if b1 is None:
        return W1 - W, None
    d = b1 - (torch.zeros_like(b1) if b is None else b)
    return W1 - W, d.float() if bool(d.abs().max() > 0) else None


def factor_rank(delta: Delta, base: Any) -> int:
    """The inner size of a low-rank delta's factors."""
    return int(factors_of(delta, base)[1].shape[-2])


def split(change: Tensor, limit: int | None, energy: float | None) -> tuple[Tensor, Tensor, int, float]:
    """B, A, the rank of a change, and the relative error of what is cut off; a stack is cut at one rank."""
    U, S, Vh = torch.linalg.svd(change, full_matrices=False)
    size = S.square().sum()
    top = S.amax(-1, keepdim=True)
    full = int((CUT * top.clamp(min=1e-300) < S).sum(-1).max()) if float(size) else 0
    kept = full if limit is None else min(full, limit)
    if energy is not None and full:
        share = S.square().reshape(-1, S.shape[-1]).sum(0).cumsum(0) / size
        kept = min(kept, int((share < energy).sum()) + 1)
    root = S[..., :kept].sqrt()
    B, A = U[..., :kept] * root[..., None, :], root[..., None] * Vh[..., :kept, :]
    lost = S[..., kept:].square().sum()
    error = float((lost / size).sqrt()) if float(size) else 0.0
    return B.contiguous(), A.contiguous(), full, error if kept < full else 0.0
