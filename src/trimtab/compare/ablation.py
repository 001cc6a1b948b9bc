"""The contestants of an ablation: one method in other places with equally many values, or with other rates of A and B.

They go into a contest like any others, so each gets its own learning rate, the same seeds and intervals on differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from trimtab.catalog import trained_values
from trimtab.compare.setup import contestant
from trimtab.core.errors import UserError, listing
from trimtab.core.part import plan
from trimtab.train.recipe import build_method, recipe_from
from trimtab.train.settings import method_settings

PLACES = ("q", "v", "q, v", "q, k, v, o", "up, down", "gate, up, down", "all-linear")
"""Where LoRA's and DoRA's papers put their factors, and where ours go by default."""
RATIOS = (1, 2, 4, 8, 16, 32)
"""λ = learning rate of B over that of A; 1 is plain LoRA, 16 what LoRA+ proposes."""
MISS = 0.2
"""How far from as many values a place may be, as a share of them."""
LARGEST = 1 << 14
"""Beyond this rank none is looked for: some methods stop growing."""


def ablation(kind: str, text: str, model: nn.Module) -> list[str]:
    """Contestants of a kind made from one (`lora:rank=8+where=q`), for a model, which may be on the meta device.

    places: the rank in every set of places is the one whose count of values is nearest to that of `text`; sets that the
    model does not have, and those where no rank comes near, are left out. ratios: `text` itself, whose ratio λ is 1,
    and LoRA+ over it at the others of `RATIOS`.
    """
    known = contestant(text).recipe
    own = method_settings(known["method"])
    if kind == "ratios":
        if "optimizer" in known:
            raise UserError(f"ablation: {text!r} has an optimizer, and the ratio is one's", fix="name none")
        if not {"rank", "alpha"} <= set(own):
            raise UserError(f"ablation: {known['method']} has no factors A and B", fix="lora, or another of its family")
        return [text, *(with_settings(text, f"optimizer=lora_plus+optimizer_ratio={ratio}") for ratio in RATIOS[1:])]
    if "rank" not in own:
        raise UserError(f"ablation: {known['method']} has no rank to keep its size with", fix="lora, dora, ...")
    wanted, _ = trained_values(model, made(known), known.get("where"))
    base = {key: value for key, value in known.items() if key not in ("method", "rank", "where")}
    found, seen = [], set()
    for place in PLACES:
        try:
            sites = tuple(sorted(one.name for part in plan(model, made(known), place) for one in part.places))
        except UserError:
            continue
        if sites in seen:
            continue
        seen.add(sites)
        rank = nearest_rank(model, known, place, wanted)
        count, _ = trained_values(model, made({**known, "rank": rank}), place)
        if abs(count - wanted) > MISS * wanted:
            continue
        settings = "+".join(f"{key}={value}" for key, value in {"rank": rank, **base, "where": place}.items())
        found.append(f"{known['method']}:{settings}")
    if len(found) < 2:
        raise UserError(
            f"ablation: with about {wanted:,} values, {known['method']} has a rank in fewer than two of the places "
            f"{listing(PLACES)}",
            fix="a larger rank, or places with fewer sites",
        )
    return found


def made(recipe: Any) -> Any:
    """The method of a contestant's recipe."""
    return build_method(recipe_from({"model": "-", "data": "-", **{k: v for k, v in recipe.items() if k != "where"}}))


def nearest_rank(model: nn.Module, recipe: Any, place: str, wanted: int) -> int:
    """The rank with which a method in a place trains most nearly `wanted` values."""

    def count(rank: int) -> int:
        return trained_values(model, made({**recipe, "rank": rank}), place)[0]

    first = max(1, wanted // max(1, count(1)))  # counts grow with the rank, mostly in proportion
    while count(first) < wanted and first < LARGEST:
        first *= 2
    low = 1
    while low < first:
        middle = (low + first) // 2
        low, first = (low, middle) if count(middle) >= wanted else (middle + 1, first)
    return min((max(1, low - 1), low), key=lambda rank: abs(count(rank) - wanted))


def with_settings(text: str, more: str) -> str:
    """A contestant with more settings."""
    return f"{text}{'+' if ':' in text else ':'}{more}"


def ablated(kind: str, texts: Sequence[str], model: nn.Module) -> tuple[str, ...]:
    """The contestants of all, each once."""
    return tuple(dict.fromkeys(one for text in texts for one in ablation(kind, text, model)))
