"""What there is: methods, starts, presets, formats, optimizers and schedules by name, and what each says of itself."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import takewhile
from typing import Any

from torch import nn

from trimtab.core.draw import site_at
from trimtab.core.errors import UserError, listing, nearest
from trimtab.core.method import Method, Placed, WeightMethod
from trimtab.core.part import Attachable, plan
from trimtab.core.registry import find, name_of, names, to_json
from trimtab.core.select import WEIGHTLESS, select
from trimtab.core.site import Site
from trimtab.core.state import State

KINDS = ("methods", "presets", "start", "storage", "optim", "active")
APART = {"storage": "storage", "optim": "update", "active": "schedule"}
"""Kinds that are not attached -> the axis they are on."""
FLOATS = ("float32", "bfloat16", "float16")
ARXIV = re.compile(r"\b\d{4}\.\d{4,5}\b")
COST = (r"bits per weight", r"\bcosts?\b|multiplication", r"addition|\btrains\b|\badds\b", r"[Ss]tate")
"""What a sentence on the cost holds, the surest sign first."""


class Catalog(Mapping[str, Any]):
    """Name -> class; a file is imported when its class is asked for. Printed, it is a table."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __getitem__(self, name: str) -> Any:
        if name not in names(self.kind):
            raise KeyError(name)
        return find(name, self.kind)

    def __iter__(self) -> Iterator[str]:
        return iter(names(self.kind))

    def __len__(self) -> int:
        return len(names(self.kind))

    def __repr__(self) -> str:
        facts = [describe(name, self.kind) for name in self]
        wide = max((len(one["name"]) for one in facts), default=0)
        return "\n".join(f"{one['name']:{wide}}  {one['paper']:10}  {one['equation']}" for one in facts)


def methods() -> Mapping[str, Any]:
    """Every registered method: name -> class, with `paper`, `space`, `where`, `learning_rate`, `mergeable`."""
    return Catalog("methods")


def starts() -> Mapping[str, Any]:
    """Every start of LoRA's factors: name -> class."""
    return Catalog("start")


def formats() -> Mapping[str, Any]:
    """Every storage format: name -> class."""
    return Catalog("storage")


def optimizers() -> Mapping[str, Any]:
    """Every update rule, for `--optimizer`: name -> class."""
    return Catalog("optim")


def schedules() -> Mapping[str, Any]:
    """Every schedule of what trains when, for `--active`: name -> class."""
    return Catalog("active")


def presets() -> dict[str, Callable[..., Any]]:
    """Every preset: name in lower case -> function."""
    from trimtab import presets as module

    found = {name: value for name, value in vars(module).items() if name[:1].isupper() and inspect.isfunction(value)}
    return {name.lower(): value for name, value in sorted(found.items()) if value.__module__ == module.__name__}


def entries() -> list[tuple[str, str]]:
    """(name, kind) of everything there is; a preset may be called like the start it is made of."""
    listed = {"presets": list(presets())}
    return [(name, kind) for kind in KINDS for name in listed.get(kind) or names(kind)]


def look_up(name: str, kind: str | None = None) -> tuple[str, str]:
    """(name, kind) of what a spelling means, presets before starts; an unknown one is an error naming the nearest."""
    plain = name.lower().replace("-", "").replace("_", "")
    known = [entry for entry in entries() if kind is None or entry[1] == kind]
    for entry in known:
        if entry[0].replace("_", "") == plain:
            return entry
    spelled = list(dict.fromkeys(entry[0] for entry in known))
    close = nearest(name, spelled)
    fix = f"did you mean {listing(close)}?" if close else f"there are {listing(spelled, 80)}"
    raise UserError(f"no method, preset, start, format, optimizer or schedule named {name!r}", fix=fix)


def made_by(name: str, kind: str) -> Any:
    """The function of a preset, the class of anything else."""
    return presets()[name] if kind == "presets" else find(name, kind)


def attachable(name: str, kind: str) -> Any:
    """What is attached for an entry with the settings it has by default; None for what is not attached."""
    if kind in APART:
        return None
    made = made_by(name, kind)()
    return find("lora")(start=made) if kind == "start" else made


def describe(name: str, kind: str | None = None) -> dict[str, Any]:
    """What an entry says of itself, as plain data.

    `settings` has type and default of each as JSON. A preset has its `parts`, and its `start` where there is one.
    """
    name, kind = look_up(name, kind)
    made = made_by(name, kind)
    parts = parts_of(attachable(name, kind))
    chosen = [method for method, _ in parts]
    start = start_of(chosen) if kind == "presets" else None
    source = type(start) if start is not None else made
    if kind == "presets" and start is None and len(parts) == 1:
        source = type(chosen[0])
    spaces = list(dict.fromkeys(method.space for method in chosen))
    facts: dict[str, Any] = {
        "name": name,
        "class": made.__name__,
        "kind": kind,
        "space": listing(spaces) or APART[kind],
        "paper": paper_of(made),
        "equation": first_line(source),
        "summary": first_line(made) if kind == "presets" else summary_of(made),
        "cost": cost_of(source) or " ".join(dict.fromkeys(cost_of(type(method)) for method in chosen)),
    }
    if kind in APART:
        return facts | measures(made(), kind) | {"settings": fields(made)}
    facts |= {
        "where": ", ".join(dict.fromkeys(where for _, where in parts)),
        "mergeable": all(method.mergeable for method in chosen),
        "merges_into_codes": all(exact(method) for method in chosen),
        "hosts": sorted({host for method in chosen for host in method.hosts}),
        "storages": storages_of(chosen),
        "laws": {law: reason for method in chosen for law, reason in method.laws.items()},
        "learning_rate": chosen[0].rate(1024),
        "width_power": chosen[0].width_power,
        "needs": needs_of(chosen),
        "settings": fields(made),
    }
    if kind == "presets":
        listed = [
            {"where": where, "learning_rate": one.rate(1024), "width_power": one.width_power, **to_json(one)}
            for one, where in parts
        ]
        return facts | {"parts": listed, "start": None if start is None else name_of(type(start))}
    using = [one for one in presets() if any(uses(method, made) for method, _ in parts_of(attachable(one, "presets")))]
    return facts | {"presets": using}


def measures(made: Any, kind: str) -> dict[str, Any]:
    """What is counted of a format (bits per weight) and of an optimizer (bytes of state per value of a matrix)."""
    if kind == "storage":
        return {"bits_per_weight": round(made.bits((4096, 4096)), 3)}
    if kind == "active":
        return {}
    return {
        "state_bytes_per_value": round(made.state_bytes((4096, 4096)) / 4096**2, 3),
        "in_backward": made.in_backward,
        "rate_factor": made.relative_rate,
    }


# ----------------------------------------------------------------------------------------------- on a model


def on_model(name: str, model: nn.Module, width: int, kind: str | None = None) -> dict[str, Any]:
    """What an entry comes to on a model, on the meta device too: trained values by formula, their share, the rate.

    For a format: the bytes of the linear weights. For an optimizer: the bytes of its state where all parameters train.
    `problem` says why it does not go on this model.
    """
    name, kind = look_up(name, kind)
    total = sum(parameter.numel() for parameter in model.parameters())
    try:
        if kind == "storage":
            shapes = [site_at(model, State(), place).base.shape for place in select(model, "all-linear")]
            format: Any = find(name, kind)()
            return {"bytes": sum(map(format.bytes, shapes)), "weights": sum(out * into for out, into in shapes)}
        if kind == "optim":
            rule: Any = find(name, kind)()
            return {"bytes": sum(rule.state_bytes(tuple(p.shape)) for p in model.parameters()), "values": total}
        if kind == "active":
            return {}
        method = attachable(name, kind)
        count, sites = trained_values(model, method)
    except UserError as error:
        return {"problem": error.message}
    rate = parts_of(method)[0][0].rate(width)
    return {"parameters": count, "share": count / total, "sites": sites, "learning_rate": rate}


def trained_values(model: nn.Module, method: Attachable, where: str | None = None) -> tuple[int, int]:
    """How many values a method would train on a model, by its formula, and at how many sites; nothing is attached."""
    count = sites = 0
    for part in plan(model, method, where):
        found = [site_at(model, State(), place, index) for index, place in enumerate(part.places)]
        count += sum(part.method.count(site) * matrices(site) for site in found) + part.method.count_shared(found)
        sites += len(found)
    return count, sites


def matrices(site: Site) -> int:
    """How many matrices a site stacks: the experts of a mixture, else one."""
    if site.kind in WEIGHTLESS:
        return 1
    W = site.base.weight
    return W.shape[0] if W.ndim == 3 else 1


# ------------------------------------------------------------------------------------------- what one says


def parts_of(made: Any) -> list[tuple[Any, str]]:
    """The methods of what a preset returns, each with where it goes."""
    if made is None:
        return []
    listed = made if isinstance(made, tuple | list) else (made,)
    pairs = [tuple(one) if isinstance(one, Placed) else (one, None) for one in listed]
    return [(method, where or method.where) for method, where in pairs]


def inner(method: Any) -> list[Any]:
    """A method, and every method or start in its fields."""
    values = [getattr(method, field.name) for field in dataclasses.fields(method)]
    return [method, *(one for value in values if dataclasses.is_dataclass(value) for one in inner(value))]


def uses(method: Any, cls: type) -> bool:
    """Whether a method is of a class, or has one of it in its fields."""
    return any(type(one) is cls for one in inner(method))


def start_of(chosen: list[Any]) -> Any:
    """The start object in these methods, if there is one."""
    known = set(starts())
    return next((one for method in chosen for one in inner(method) if name_of(type(one)) in known), None)


def exact(method: Method) -> bool:
    """Whether merging is exact on codes too: the method has a rule of its own for it."""
    return method.mergeable and type(method).merge is not WeightMethod.merge  # type: ignore[attr-defined]


def storages_of(chosen: list[Method]) -> list[str]:
    """What the frozen weights may be kept in: a floating type, or any format, where the method is right on codes."""
    able = not any("quantized" in method.laws for method in chosen)
    coded = [name for name in formats() if name != "dense"] if able else []
    return coded if "quantize" in needs_of(chosen) else [*FLOATS, *coded]


def needs_of(chosen: list[Method]) -> list[str]:
    """What is measured on the model before the start (`fisher`), and whether it must be about to be quantized."""
    measured = [method.statistics for method in chosen if method.statistics]
    coded = any(getattr(one, "needs_format", False) for method in chosen for one in inner(method))
    return [*dict.fromkeys(measured), *(["quantize"] if coded else [])]


def fields(made: Any) -> dict[str, dict[str, Any]]:
    """Setting -> type and default as JSON, of a method class or a preset; a default made anew is made."""
    factories = {one.name: one.default_factory for one in dataclasses.fields(made)} if isinstance(made, type) else {}
    found = {}
    for name, one in inspect.signature(made).parameters.items():
        factory = factories.get(name, dataclasses.MISSING)
        value = factory() if callable(factory) else one.default
        found[name] = {"type": str(one.annotation), "default": to_json(value)}
    return found


def first_line(made: Any) -> str:
    """The first line of a docstring: for a method, its equation."""
    return next(iter((inspect.getdoc(made) or "").splitlines()), "")


def summary_of(made: Any) -> str:
    """The first line of the file that a method, start or format is in: its name in words."""
    return first_line(inspect.getmodule(made)) or first_line(made)


def paper_of(made: Any) -> str:
    """arXiv id: the class's own, or the first one its docstring names."""
    named = ARXIV.search(inspect.getdoc(made) or "")
    return getattr(made, "paper", "") or (named.group() if named else "")


def cost_of(made: Any) -> str:
    """The sentences of a docstring that tell the cost: behind the equation, before the reference."""
    lines = (inspect.getdoc(made) or "").splitlines()[1:]
    lines = list(takewhile(lambda line: not re.match(r"(No )?arXiv|Reference", line), lines))
    sentences = re.split(r"(?<=[.;])\s+(?=[A-Z])", " ".join(" ".join(lines).split()))
    for words in COST:
        found = [one for one in sentences if re.search(words, one, re.IGNORECASE)]
        if found:
            return " ".join(found)
    return ""


# --------------------------------------------------------------------------------------------------- as Markdown


def markdown() -> str:
    """The table of methods and presets as Markdown, as it stands in the README."""
    lines = ["| name | what it computes | default sites | merges | paper |", "|---|---|---|---|---|"]
    for name in methods():
        facts = describe(name, "methods")
        merges = "yes" if facts["mergeable"] else "no"
        lines.append(
            f"| `{name}` | {cell(facts['equation'])} | `{facts['where']}` | {merges} | {linked(facts['paper'])} |"
        )
    for name, made in presets().items():
        lines.append(f"| `{name}` (preset) | {cell(first_line(made))} | | | |")
    return "\n".join(lines)


def cell(text: str) -> str:
    """A text inside a Markdown table."""
    return text.replace("|", "\\|").rstrip(".")


def linked(paper: str) -> str:
    """An arXiv id as a Markdown link."""
    return f"[{paper}](https://arxiv.org/abs/{paper})" if paper else ""
