"""Which parts an attachment has and where each goes: everything that does not match is said before anything changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from trimtab.core.draw import site_at
from trimtab.core.errors import UserError, listing
from trimtab.core.hosts import is_raw, raw_weight
from trimtab.core.install import clash, deltas_class
from trimtab.core.method import InputMethod, Method, Placed, WeightMethod
from trimtab.core.places import Place, Reading, readings
from trimtab.core.registry import name_of
from trimtab.core.select import select
from trimtab.core.stack import stack_of
from trimtab.core.state import Part, State

Attachable = Method | Placed | Sequence[Method | Placed]


def plan(model: nn.Module, method: Attachable, where: str | None = None) -> list[Part]:
    """Resolve where each part of an attachment goes; raises one error for everything that does not match."""
    listed = list(method) if isinstance(method, Sequence) else [method]
    if not listed:
        raise UserError("attach: no method was given")
    if where is not None and len(listed) > 1:
        raise UserError(
            "attach: `where` is ambiguous for a preset of several parts",
            fix='give each part its own place: [LoRA().at("q, v"), ...]',
        )
    parts: list[Part] = []
    labels: dict[str, int] = {}
    for item in listed:
        one, place = item if isinstance(item, Placed) else (item, None)
        if not isinstance(one, Method):
            starts = getattr(one, "begin", None) is not None
            fix = f"trimtab.LoRA(rank=8, start={one!r})" if starts else "for example trimtab.LoRA(rank=8)"
            raise UserError(f"attach: expected a method, found {one!r}", fix=fix)
        place = where or place or one.where
        stem = name_of(type(one))
        labels[stem] = labels.get(stem, 0) + 1
        label = stem if labels[stem] == 1 else f"{stem}-{labels[stem]}"
        try:
            places = select(model, place, kinds=kinds_of(one))
            if one.on_bias:
                places = biased(model, places, place)
        except UserError as error:
            raise UserError(f"attach({type(one).__name__}): {error.message}", fix=error.fix) from None
        problems = [problem for found in places if (problem := unfit(model, one, found))]
        if problems:
            raise UserError(f"attach({type(one).__name__}): {listing(problems, 5)}")
        parts.append(Part(one, place, label, places))
        sources(model, parts[-1])
    one_statistic(parts)
    return parts


def one_statistic(parts: Sequence[Part]) -> None:
    """Refuse parts that want different things measured at one site: what is measured goes by the name of its site."""
    seen: dict[str, tuple[str, Any]] = {}
    problems = []
    for part in parts:
        if part.method.statistics is None:
            continue
        wanted = (part.method.statistics, getattr(part.method, "tokens", ()))
        for place in part.places:
            first = seen.setdefault(place.name, wanted)
            if first != wanted:
                other = "those of another text" if first[0] == wanted[0] else f"its {wanted[0]}"
                problems.append(f"at {place.name} one part wants its {first[0]}, another {other}")
    if problems:
        raise UserError(f"attach: {listing(problems, 3)}", fix="attach one part after the other, each with its own")


def sources(model: nn.Module, part: Part) -> list[Reading | None]:
    """Where what a part reads beside its sites' inputs passes by; an error where that is not known."""
    if not part.method.source:
        return [None] * len(part.places)
    try:
        return readings(model, part.places, part.method.source)
    except UserError as error:
        raise UserError(f"attach({type(part.method).__name__}): {error.message}", fix=error.fix) from None


def biased(model: nn.Module, places: Sequence[Place], where: str) -> list[Place]:
    """The places that have a bias; an error where none has."""
    found = [place for place in places if site_at(model, State(), place).base.bias is not None]
    if not found:
        names = listing([place.name for place in places], 2)
        raise UserError(
            f'none of the {len(places)} places of "{where}" has a bias ({names})',
            fix="OutputBias adds a trained one where there is none",
        )
    return found


def two_ways(model: nn.Module, parts: Sequence[Part]) -> None:
    """Refuse parts that would edit one module in two ways: through its forward, as a raw weight, in its attention."""
    seen: dict[str, str] = {}
    problems = []
    for part in parts:
        for place in part.places:
            module = model.get_submodule(place.module)
            way = deltas_class(module, place).way
            if seen.setdefault(place.module, way) != way:
                both = " and ".join(sorted((seen[place.module], way), reverse=True))
                problems.append(f"{place.name} would be edited both {both}")
            elif (problem := clash(module, place)) is not None:
                problems.append(problem)
    if problems:
        raise UserError(f"attach: {listing(problems, 5)}", fix="leave these sites out of one of the two `where`s")


def kinds_of(method: Method) -> frozenset[str]:
    """The kinds of place a method can sit on; an edit of a linear's weight fits a raw matrix too."""
    raw = isinstance(method, WeightMethod) and "linear" in method.hosts
    return method.hosts | {"raw"} if raw else method.hosts


def dropout_of(method: Method) -> float:
    """The dropout a method asks for, itself or in a method it is built on."""
    values = [getattr(method, field.name) for field in dataclasses.fields(method)]
    return max([getattr(method, "dropout", 0.0), *(dropout_of(one) for one in values if isinstance(one, Method))])


def unfit(model: nn.Module, method: Method, place: Place) -> str | None:
    """Why a method cannot sit at a place, or None."""
    module = model.get_submodule(place.module)
    kind = place.kind
    if is_raw(module, place):
        if not isinstance(method, WeightMethod):
            return f"{place.name} is read as a raw weight, which only a weight-space method can edit"
        layout = raw_weight(module, place)
        if dropout_of(method):
            return f"{place.name} is read as a raw weight, so there is no input to drop out: dropout=0 there"
        if layout.kind == "experts" and method.elastic:
            return f"{place.name} is a stack of matrices, and {type(method).__name__} picks another shape for each"
        if layout.kind == "experts" and not method.stackable:
            return f"{place.name} is a stack of matrices, and {type(method).__name__} keeps only single ones"
        if layout.kind == "experts" and layout.bias(module) is None and type(method).weight is WeightMethod.weight:
            return f"{place.name} has no bias, and {type(method).__name__} edits nothing else"
        return None
    if kind not in method.hosts:
        return f"{place.name} is a {kind} site; {type(method).__name__} supports {listing(sorted(method.hosts))}"
    if isinstance(method, InputMethod) and stack_of(model, place.module) is None:
        return f"{place.name} has no ancestor that takes input_ids, so virtual tokens cannot be added"
    return None
