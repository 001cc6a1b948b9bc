"""What a contest is about: methods, rows in three parts, and the runs that one budget allows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.catalog import attachable, describe, look_up
from trimtab.core.errors import UserError, listing
from trimtab.core.registry import to_json
from trimtab.data.forms import detect, examples
from trimtab.data.reading import Table, read
from trimtab.data.splitting import held_amount, share_in_use, split, take
from trimtab.evaluate.reference import BUILT_IN
from trimtab.train.settings import method_settings

PARTS = ("train", "choose", "judge")
FIRST = 0.25
"""Length of the runs of the first round, as a share of a final one; those of the second have its length."""
FEWEST = 8
"""Steps of the shortest run."""
JUDGED = 1500
"""Rows that a share of a larger file holds out where fewer would do for few training rows: they choose and judge."""
REFERENCES = ("untuned", "few-shot", "head only", "full")
SEARCHED: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "lora": {"rank": (4, 32)},
    "dora": {"rank": (4, 32)},
    "rslora": {"rank": (32,)},
    "adalora": {"target": (4,)},
    "prefix_tuning": {"length": (10, 100)},
    "prompt_tuning": {"length": (10, 100)},
    "p_tuning": {"length": (10, 50)},
    "houlsby": {"bottleneck": (16, 128)},
    "pfeiffer": {"bottleneck": (16, 128)},
    "parallel": {"bottleneck": (16, 128)},
    "loreft": {"rank": (1, 16)},
    "vera": {"rank": (64,)},
}
"""Settings other than the learning rate that the published comparisons found to matter, and what else is tried."""


@dataclass(frozen=True)
class Setup:
    """One contest. Everything that changes a result is in here; where it is written is not."""

    model: str
    data: str
    methods: tuple[str, ...]
    columns: Mapping[str, str] = field(default_factory=dict)
    heldout: str = "0.2"
    """Rows kept from training, a share, a number or a file: a third chooses rates, the rest judges (`held_out`)."""
    limit: int | None = None
    seeds: int = 3
    steps: int | None = None
    """Steps of a final run; None: one pass over the rows, or fewer where `minutes` asks for it."""
    minutes: float | None = None
    batch_size: int = 8
    rates: tuple[float, ...] = (0.25, 1.0, 4.0)
    """Of the first round, times the method's own learning rate."""
    refine: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Of the second round, times the best of the first."""
    search: bool = False
    """Whether the settings of `SEARCHED` are tried too."""
    references: tuple[str, ...] = REFERENCES
    reference_text: str = BUILT_IN
    """A text file on which forgetting is measured, the change of its loss; `built-in` or `none`. For causal models."""
    max_length: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if len(self.methods) < 1:
            problems.append("no methods")
        if self.seeds < 1:
            problems.append(f"seeds={self.seeds}")
        if not self.rates or min(self.rates) <= 0 or not self.refine or min(self.refine) <= 0:
            problems.append(f"rates={self.rates}, refine={self.refine}")
        if self.steps is not None and self.steps < FEWEST:
            problems.append(f"steps={self.steps}, fewer than {FEWEST}")
        if unknown := [name for name in self.references if name not in REFERENCES]:
            problems.append(f"references {listing(unknown)}, which are none of {listing(REFERENCES)}")
        if problems:
            raise UserError(f"compare: {'; '.join(problems)}")


@dataclass(frozen=True)
class Entry:
    """One contestant: a method or preset with settings, as a recipe has it."""

    name: str
    recipe: Mapping[str, Any]
    kind: str = "method"
    """method, or reference."""
    alternatives: tuple[Mapping[str, Any], ...] = ()
    """Other settings that are tried in the first round."""

    @property
    def trains(self) -> bool:
        return self.name not in ("untuned", "few-shot")


def entries_of(setup: Setup, task: str, fits_full: bool) -> list[Entry]:
    """The contestants, references first; a name that means nothing is an error before anything runs."""
    found = [contestant(text, setup.search) for text in setup.methods]
    names = [one.name for one in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"compare: {listing(twice)} named twice", fix="name each method once")
    listed = []
    for name in setup.references:
        if name == "untuned" or (name == "few-shot" and task == "causal"):
            listed.append(Entry(name, {"method": "lora"}, "reference"))
        elif name == "head only" and task in ("classify", "regress") and "headonly" not in names:
            listed.append(Entry(name, {"method": "headonly"}, "reference"))
        elif name == "full" and fits_full and "full" not in names:
            listed.append(Entry(name, {"method": "full", "where": "all"}, "reference"))
    return [*listed, *found]


def contestant(text: str, search: bool = False) -> Entry:
    """`lora`, `prefix` where only one name begins so, or `lora:rank=16+where=q` with settings."""
    name, _, given = text.strip().partition(":")
    known, kind = look_up(beginning(name))
    if kind not in ("methods", "presets"):
        raise UserError(f"{name} is not a method", fix="`trimtab methods` lists methods and presets")
    settings = settings_of(text, known, given)
    recipe: dict[str, Any] = {"method": known, **settings}
    if known == "full" and "where" not in settings:
        recipe["where"] = "all"
    if "quantize" in describe(known, kind)["needs"]:
        recipe.setdefault("quantize", "nf4")
    tried = SEARCHED.get(known, {}) if search else {}
    others = tuple({key: value} for key, values in tried.items() if key not in settings for value in values)
    return Entry(text.strip(), recipe, "method", others)


def beginning(name: str) -> str:
    """The full name where exactly one method or preset begins with what was typed, else what was typed."""
    from trimtab.catalog import entries

    plain = name.lower().replace("-", "_")
    known = [one for one, kind in entries() if kind in ("methods", "presets")]
    found = {one for one in known if one.startswith(plain)}
    exact = any(one.replace("_", "") == plain.replace("_", "") for one in known)
    whole = found & {f"{plain}_tuning"}
    return next(iter(whole or found)) if not exact and (whole or len(found) == 1) else name


BESIDE = ("optimizer_", "active_", "quantize_")
"""Beginnings of settings of what these keys name; `recipe_from` knows which there are."""


def settings_of(text: str, name: str, given: str) -> dict[str, Any]:
    """The settings behind a name, `rank=16+alpha=32`."""
    known, found = {*method_settings(name), "where", "quantize", "optimizer", "active"}, {}
    for item in filter(None, given.split("+")):
        key, equals, value = item.partition("=")
        if not equals or not (key in known or key.startswith(BESIDE)):
            raise UserError(
                f"{text!r}: {item!r} is no setting of {name}",
                fix=f"{name}:SETTING=VALUE with {listing(sorted(known))}",
            )
        found[key] = value
    return found


def identity(entry: Entry) -> list[Any]:
    """What a method comes to, so that a changed default is a new run."""
    name, kind = look_up(entry.recipe["method"])
    made = attachable(name, kind)
    return [entry.name, dict(entry.recipe), str(to_json(made))]


# ------------------------------------------------------------------------------------------------------ rows


def write_parts(setup: Setup, folder: Path) -> dict[str, int]:
    """The three parts as files of the form the data has; the same ones for the same setup. Returns how many rows."""
    table = read(setup.data)
    found = examples(table, detect(table, setup.columns or None))
    if Path(setup.heldout).is_file():
        other = read(setup.heldout)
        kept, source = examples(other, detect(other, setup.columns or None)), other
        train = found
    else:
        wanted = share_in_use(held_amount(setup.heldout), len(found), setup.limit, JUDGED)
        train, kept = split(found, wanted, setup.seed)
        source = table
    if len(kept) < 4:
        raise UserError(
            f"compare: {len(kept)} rows are held out; they have to choose learning rates and to judge",
            fix="hold out more: --heldout 0.2, or a file",
        )
    judge, choose = split(kept, max(1, len(kept) // 3), setup.seed)
    train = take(train, setup.limit, setup.seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows, origin in (("train", train, table), ("choose", choose, source), ("judge", judge, source)):
        write_rows(folder / f"{name}.jsonl", rows, origin)
    return {"train": len(train), "choose": len(choose), "judge": len(judge)}


def write_rows(path: Path, rows: Sequence[Any], table: Table) -> None:
    """Rows of a table as they stand in it."""
    lines = [json.dumps(table.rows[one.row - 1], ensure_ascii=False, default=str) for one in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def key_of(setup: Setup, rows: str, entry: Entry, about: Mapping[str, Any]) -> str:
    """What makes a run this run."""
    same = {key: value for key, value in dataclasses.asdict(setup).items() if key in SAME}
    told = [same, rows, identity(entry), dict(about)]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]


SAME = ("model", "batch_size", "max_length", "dtype", "device", "seed", "columns", "reference_text")
"""What runs of one directory have in common; methods, seeds and the budget may grow from one call to the next."""


# ------------------------------------------------------------------------------------------------------ cost


def cost(setup: Setup, entry: Entry) -> float:
    """Steps of all runs of one contestant, in final runs; the best of the second round is the first of those."""
    if not entry.trains:
        return 0.0
    first = len(setup.rates) + len(entry.alternatives)
    return (first * FIRST if first > 1 else 0.0) + len(setup.refine) + setup.seeds - 1


def naive_cost(setup: Setup, entry: Entry) -> float:
    """What a full grid over the same rates and settings would take: every point, every seed, full length."""
    if not entry.trains:
        return 0.0
    rates = {round(one * other, 6) for one in setup.rates for other in setup.refine}
    return float(len(rates) * (1 + len(entry.alternatives)) * setup.seeds)
