"""One adapter of several, all at the same model: sums, concatenation, TIES, DARE, pruning by magnitude, SVD.

Everything works on the change of a weight, ΔW = W' − W, so adapters of any weight method can be combined and the
result is a plain LoRA. Where every adapter is a LoRA, `sum` and `cat` never build ΔW: the factors are put side by side,
which is exact. One adapter of weight 1 is handed back as it is, bit for bit, whatever the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.attach import activate
from trimtab.core.delta import Group
from trimtab.core.draw import site_at
from trimtab.core.errors import UserError, listing
from trimtab.core.places import Place
from trimtab.core.raw import edit_raw
from trimtab.core.registry import find
from trimtab.core.save import attach_saved
from trimtab.core.state import State
from trimtab.interop.peft.lora import is_lora
from trimtab.interop.saved import Draft, Saved, SavedSite, assemble, saved_of
from trimtab.interop.shards import delta_of, layout_of, nested
from trimtab.interop.to_lora import Fit, padded, split

WAYS = ("sum", "cat", "ties", "dare", "dare_ties", "magnitude_prune", "svd")


@dataclass(frozen=True)
class Settings:
    """How adapters are combined."""

    how: str = "sum"
    weights: tuple[float, ...] = ()
    density: float = 0.5
    """Share of the entries of each change that TIES, DARE and pruning keep."""
    rank: int | None = None
    """Rank of the result where it is not exact; None: the sum of the ranks that were combined."""
    seed: int = 0
    """What DARE draws its entries from."""


def combine(
    model: nn.Module,
    names: Sequence[str],
    how: str = "sum",
    weights: Sequence[float] | None = None,
    *,
    density: float = 0.5,
    rank: int | None = None,
    seed: int = 0,
    name: str = "combined",
) -> nn.Module:
    """Attach one adapter made of several attached ones, and use it alone; returns the model.

    `sum` and `cat`: Σ w_i ΔW_i (arXiv 2212.04089). `svd`: the same, cut at a rank. `magnitude_prune`: each change keeps
    its `density` largest entries. `ties` (arXiv 2306.01708): those, then per entry the sign of the larger sum, and the
    weighted mean of the changes that agree with it. `dare` (arXiv 2311.03099): each change keeps entries drawn with
    probability `density`, divided by it. `dare_ties`: DARE's entries, TIES' signs. Trained biases are added with their
    weights. The result is a plain LoRA of `rank` (None: of all ranks together); one adapter with weight 1 comes back as
    it is. Errors: adapters that change no weight, norms that two of them train differently.
    """
    adapters = [saved_of(model, one, verb="combine") for one in names]
    made, _ = combined(model, adapters, how, weights, density=density, rank=rank, seed=seed, name=name)
    attach_saved(model, made.record, made.tensors, "combine", name)
    return activate(model, name)


def combined(
    model: nn.Module,
    adapters: Sequence[Saved],
    how: str = "sum",
    weights: Sequence[float] | None = None,
    *,
    density: float = 0.5,
    rank: int | None = None,
    seed: int = 0,
    name: str = "default",
) -> tuple[Saved, list[Fit]]:
    """One saved adapter of several, and how well its ranks hold what was combined. `model` is the base of all."""
    settings = checked(Settings(how, tuple(weights or ()), density, rank, seed), len(adapters))
    if len(adapters) == 1 and settings.weights == (1.0,):
        only = adapters[0]
        return Saved(only.record | {"name": name}, dict(only.tensors)), []
    stuck = [type(part.method).__name__ for one in adapters for part in one.parts if not part.method.mergeable]
    if stuck:
        raise UserError(f"combine: {listing(dict.fromkeys(stuck))} changes no weight, so it adds to nothing")
    plain = all(is_lora(part.method) and not hasattr(part.method, "inner") for one in adapters for part in one.parts)
    if plain and how in ("sum", "cat"):
        return assemble(model, beside(adapters, settings.weights), name=name, notes=told(settings)), []
    drafts, fits = blended(model, adapters, settings)
    return assemble(model, drafts, name=name, notes=told(settings)), fits


def told(settings: Settings) -> dict[str, Any]:
    """What the record of the result says of how it was made."""
    return {"from": "combine", "how": settings.how, "weights": list(settings.weights)}


def checked(settings: Settings, count: int) -> Settings:
    """The settings with every weight there, or an error naming what is wrong."""
    problems = []
    if settings.how not in WAYS:
        problems.append(f"how={settings.how!r} is none of {', '.join(WAYS)}")
    weights = settings.weights or (1.0,) * count
    if len(weights) != count:
        problems.append(f"{len(weights)} weights for {count} adapters")
    if not count:
        problems.append("no adapter was given")
    if not 0 < settings.density <= 1:
        problems.append(f"density={settings.density} is no share")
    if settings.rank is not None and settings.rank < 1:
        problems.append(f"rank={settings.rank}")
    if problems:
        raise UserError(f"combine: {'; '.join(problems)}", fix="for example --how ties --weights 1,0.5 --density 0.5")
    return Settings(settings.how, tuple(map(float, weights)), settings.density, settings.rank, settings.seed)


def scaled(site: SavedSite, method: Any) -> tuple[Tensor, Tensor]:
    """B with its scale and A of a LoRA's site."""
    held = site.tensors
    A, B = held["A"], held["B"]
    alpha = float(held["alpha"].flatten()[0]) if "alpha" in held else method.alpha
    s = alpha / (method.rank if method.elastic else A.shape[-2]) ** method.rank_power
    if method.takes_out:
        A, B = torch.cat([A, held["A0"]], -2), torch.cat([B, -held["B0"]], -1)
    return B * s, A


def beside(adapters: Sequence[Saved], weights: Sequence[float]) -> list[Draft]:
    """Σ w_i B_i A_i as one product: the factors side by side."""
    found: dict[str, tuple[Place, list[Tensor], list[Tensor]]] = {}
    for one, weight in zip(adapters, weights, strict=True):
        for part in one.parts:
            for site in part.sites:
                B, A = scaled(site, part.method)
                entry = found.setdefault(site.place.name, (site.place, [], []))
                entry[1].append(B * weight)
                entry[2].append(A)
    return padded([(place, torch.cat(B, -1), torch.cat(A, -2)) for place, B, A in found.values()])


# ------------------------------------------------------------------------------------------------- changes themselves


def blended(model: nn.Module, adapters: Sequence[Saved], settings: Settings) -> tuple[list[Draft], list[Fit]]:
    """Drafts of a LoRA that is the combined change of every weight, with trained biases and copies."""
    changes: dict[str, tuple[Place, list[tuple[float, Tensor]], int]] = {}
    biases: dict[str, tuple[Place, Tensor]] = {}
    copies: dict[str, Draft] = {}
    for one, weight in zip(adapters, settings.weights, strict=True):
        for name, (place, change, d, rank) in changes_of(model, one, copies).items():
            entry = changes.get(name, (place, [], 0))
            changes[name] = (place, [*entry[1], (weight, change)], entry[2] + rank)
            if d is not None:
                biases[name] = (place, biases[name][1] + weight * d if name in biases else weight * d)
    pairs, fits = [], []
    rule = RULES[settings.how]
    for index, (name, (place, several, ranks)) in enumerate(changes.items()):
        drawn = torch.Generator().manual_seed(settings.seed * 1_000_003 + index)
        values = torch.stack([change.double() for _, change in several])
        weights = torch.tensor([weight for weight, _ in several], dtype=torch.double)
        whole = rule(values, weights, settings.density, drawn)
        B, A, full, error = split(whole, settings.rank or max(1, ranks), None)
        fits.append(Fit(name, full, A.shape[-2], error))
        if A.shape[-2]:
            pairs.append((place, B.float(), A.float()))
    more = [Draft(place, find("output_bias")(), {"d": d.float()}) for place, d in biases.values() if bool(d.any())]
    drafts = [*padded(pairs), *more, *copies.values()]
    if not drafts:
        raise UserError("combine: the adapters change nothing")
    return drafts, fits


def changes_of(
    model: nn.Module, saved: Saved, copies: dict[str, Draft]
) -> dict[str, tuple[Place, Tensor, Tensor | None, int]]:
    """Site -> place, ΔW, the change of the bias, and a rank that holds it; copied norms go to `copies`."""
    found: dict[str, tuple[Place, Tensor, Tensor | None, int]] = {}
    for part in saved.parts:
        shared = Group(nested(part.shared)) if part.shared else None
        for site in part.sites:
            place, name = site.place, site.place.name
            if place.kind == "norm":
                add_copy(copies, Draft(place, part.method, site.tensors, part.shared))
                continue
            module: Any = model.get_submodule(place.module)
            layout, base = layout_of(module, place), site_at(model, State(), place).base
            W, b = base.weight.detach().cpu().float(), base.bias
            b = None if b is None else b.detach().cpu().float()
            delta = delta_of(part, site, shared)
            delta.rows = None
            with torch.no_grad():
                W1, b1 = edit_raw(delta, W, b, layout)
            d = None if b1 is None else b1 - (torch.zeros_like(b1) if b is None else b)
            if name in found:
                raise UserError(f"combine: one adapter is at {name} twice", fix="combine its parts first")
            rank = site.tensors["A"].shape[-2] if is_lora(part.method) and "A" in site.tensors else min(W.shape[-2:])
            found[name] = (place, W1 - W, d, min(rank, *W.shape[-2:]))
    return found


def add_copy(copies: dict[str, Draft], draft: Draft) -> None:
    """A norm that one adapter trains; two different ones cannot be told into one."""
    known = copies.get(draft.place.name)
    same = known is not None and all(torch.equal(known.tensors[key], draft.tensors[key]) for key in draft.tensors)
    if known is not None and not same:
        raise UserError(f"combine: two adapters train {draft.place.name} differently")
    copies[draft.place.name] = draft


Rule = Callable[[Tensor, Tensor, float, torch.Generator], Tensor]
"""(adapters, *shape) changes, their weights, the density, what to draw from -> the combined change."""


def weighted(changes: Tensor, weights: Tensor) -> Tensor:
    """w_i ΔW_i."""
    return changes * weights.reshape(-1, *[1] * (changes.ndim - 1))


def plain_sum(changes: Tensor, weights: Tensor, density: float, drawn: torch.Generator) -> Tensor:
    return weighted(changes, weights).sum(0)


def trimmed(changes: Tensor, density: float) -> Tensor:
    """Each change with all but its largest entries set to 0."""
    flat = changes.flatten(1)
    keep = max(1, round(density * flat.shape[1]))
    index = flat.abs().topk(keep, 1).indices
    return torch.zeros_like(flat).scatter(1, index, flat.gather(1, index)).view_as(changes)


def dropped(changes: Tensor, density: float, drawn: torch.Generator) -> Tensor:
    """Each entry kept with probability `density` and divided by it."""
    return changes * (torch.rand(changes.shape, generator=drawn) < density) / density


def elected(changes: Tensor, weights: Tensor) -> Tensor:
    """The sign of the larger sum per entry, and the weighted mean of the changes that agree with it.

    The mean is times the number of adapters' total weight, so that changes that all agree add up as in a sum.
    """
    each = weighted(changes, weights)
    agree = (each.sign() == each.sum(0).sign()) & (each != 0)
    counted = weighted(agree.double(), weights.abs()).sum(0)
    total = weights.abs().sum()
    return (each * agree).sum(0) * total / counted.clamp(min=1e-300)


def pruned(changes: Tensor, weights: Tensor, density: float, drawn: torch.Generator) -> Tensor:
    return weighted(trimmed(changes, density), weights).sum(0)


def ties(changes: Tensor, weights: Tensor, density: float, drawn: torch.Generator) -> Tensor:
    return elected(trimmed(changes, density), weights)


def dare(changes: Tensor, weights: Tensor, density: float, drawn: torch.Generator) -> Tensor:
    return weighted(dropped(changes, density, drawn), weights).sum(0)


def dare_ties(changes: Tensor, weights: Tensor, density: float, drawn: torch.Generator) -> Tensor:
    return elected(dropped(changes, density, drawn), weights)


RULES: Mapping[str, Rule] = {
    "sum": plain_sum,
    "cat": plain_sum,
    "svd": plain_sum,
    "magnitude_prune": pruned,
    "ties": ties,
    "dare": dare,
    "dare_ties": dare_ties,
}
