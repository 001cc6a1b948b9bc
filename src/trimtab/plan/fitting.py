"""Which recipes fit into a memory, in the order of the quality to expect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trimtab.core.errors import UserError
from trimtab.plan.planning import Plan, plan_of
from trimtab.plan.process import Room
from trimtab.train.recipe import recipe_from

SOURCE = (
    "Order: averages over eight commonsense tasks on LLaMA-7B (DoRA 78.4, LoRA 74.7, parallel 72.2, series 70.8, "
    "prefix 64.6; arXiv 2402.09353); places of the others are a judgement from other papers' tables: LoReFT beside "
    "DoRA on these tasks but behind LoRA on arithmetic (2404.03592), NF4 level with 16 bits (2305.14314), full "
    "fine-tuning first where there is data enough. One model, one seed: differences of a point or two are noise, and "
    "`trimtab compare` on your own data decides."
)
"""Where the order of `CANDIDATES` is from."""

CANDIDATES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("full", {"method": "full"}),
    ("full, 8-bit Adam", {"method": "full", "optimizer": "adam8"}),
    ("full, GaLore", {"method": "full", "optimizer": "galore"}),
    ("full, LISA", {"method": "full", "active": "lisa"}),
    ("full, BAdam", {"method": "full", "active": "badam"}),
    ("full, LOMO", {"method": "full", "optimizer": "lomo"}),
    ("DoRA, all linears", {"method": "dora", "settings": {"rank": 32}, "where": "all-linear"}),
    ("LoRA, all linears, rank 64", {"method": "lora", "settings": {"rank": 64}, "where": "all-linear"}),
    ("LoRA, all linears", {"method": "lora", "settings": {"rank": 16}, "where": "all-linear"}),
    (
        "QDoRA (NF4)",
        {"method": "dora", "settings": {"rank": 32}, "where": "all-linear", "quantize": "nf4-double"},
    ),
    (
        "QLoRA (NF4), rank 64",
        {"method": "lora", "settings": {"rank": 64}, "where": "all-linear", "quantize": "nf4-double"},
    ),
    ("LoReFT", {"method": "loreft"}),
    ("LoRA at q and v, rank 8", {"method": "lora", "settings": {"rank": 8}, "where": "q, v"}),
    ("parallel adapters", {"method": "parallel"}),
    ("Houlsby adapters", {"method": "houlsby"}),
    ("IA3", {"method": "ia3"}),
    ("prefix tuning", {"method": "prefix_tuning", "settings": {"hidden": None}}),
    ("LoRA at q and v on NF4", {"method": "lora", "settings": {"rank": 8}, "where": "q, v", "quantize": "nf4-double"}),
)
"""Recipes, best first by what `SOURCE` says."""


@dataclass(frozen=True)
class Candidate:
    """A recipe that was planned: as it is, or with checkpointing where it fits only so."""

    name: str
    plan: Plan

    @property
    def checkpointing(self) -> str:
        return str(self.plan.recipe["checkpointing"])


def fitting(
    model: str, room: Room, settings: dict[str, Any], tell: Callable[[str], None] = lambda _: None
) -> tuple[list[Candidate], list[Candidate], dict[str, str]]:
    """(what fits, what does not, what could not be planned and why), each in the order of expected quality."""
    good: list[Candidate] = []
    bad: list[Candidate] = []
    refused: dict[str, str] = {}
    for name, candidate in CANDIDATES:
        tell(name)
        values = {"model": model, "data": "-", **settings, **candidate}
        try:
            found = plan_of(recipe_from(values), fit=room)
            if not found.fits and not values.get("checkpointing"):
                found = plan_of(recipe_from(values | {"checkpointing": "block"}), fit=room)
        except UserError as error:
            refused[name] = error.message
            continue
        (good if found.fits else bad).append(Candidate(name, found))
    return good, bad, refused
