"""The verbs attach, detach and activate. Each one plans first and changes the model only when nothing can fail."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.attention import heads_of, projections
from trimtab.core.delta import Delta, Group
from trimtab.core.deltas import edited_modules
from trimtab.core.draw import prepare
from trimtab.core.errors import UserError, listing
from trimtab.core.format import Format
from trimtab.core.install import install, listen, stand_aside, uninstall
from trimtab.core.mapped import let_go_replaced
from trimtab.core.method import InputMethod, Method
from trimtab.core.modules import ancestors
from trimtab.core.part import Attachable, kinds_of, plan, sources, two_ways
from trimtab.core.places import Place, places
from trimtab.core.select import select
from trimtab.core.stack import install_hooks, remove_hooks, slot_name, stack_of
from trimtab.core.state import Adapter, Part, State, check_names, require_state, state_of
from trimtab.core.taken import encode_plain, encode_rest

SHARED = "trimtab_shared"


def attach(
    model: nn.Module,
    method: Attachable,
    where: str | None = None,
    *,
    name: str = "default",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    statistics: Mapping[str, Tensor] | None = None,
    quantize: Format | None = None,
    device: torch.device | None = None,
) -> nn.Module:
    """Put a method (or the parts of a preset) on a model, freeze everything else, and return the model.

    `where` says which sites, in the `where` language; None takes the method's own default. Adapters with different
    `name`s stack. The start depends on (seed, site name) only, not on the order of attaching. `dtype` keeps the
    trained tensors in a wider type than the base (fp32 masters under bf16). `statistics` maps site names to what the
    method wants measured first (`trimtab.fisher`). `quantize` stores the linear weights of its sites in a format, each
    without what a start takes out of it; they stay so after `detach`. `device` is where the tensors are made for a
    model on the meta device, as it is before its weights are read. Errors: a pattern that matches nothing, a site of
    a kind the method does not support, a name in use; nothing is changed then.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise UserError(f"attach: adapter name {name!r} is not usable", fix="letters, digits, - and _ only")
    state = state_of(model) or State()
    if name in state.adapters:
        raise UserError(
            f"attach: an adapter named {name!r} is attached already",
            fix=f"another name= to stack, or trimtab.detach(model, {name!r}) first",
        )
    parts = plan(model, method, where)
    two_ways(model, parts)
    if quantize is not None:
        encode_plain(model, parts, quantize)
    work = [(part, *prepare(model, state, part, name, seed, dtype, statistics or {}, device)) for part in parts]
    encode_rest(model, [(part, deltas) for part, deltas, _ in work])
    commit(model, state, Adapter(name, seed, parts), work)
    let_go_replaced(model)
    return model


class Groups(nn.ModuleDict):
    """What parts share, by slot. It lets a model that is itself an nn.Sequential run through it."""

    def forward(self, x: Any) -> Any:
        return x


def commit(
    model: nn.Module, state: State, adapter: Adapter, work: Sequence[tuple[Part, list[Delta], Group | None]]
) -> None:
    """Install prepared deltas: once sources are known, nothing is refused any more."""
    read = [sources(model, part) for part, *_ in work]
    if not state.adapters:
        state.frozen = {key: value.requires_grad for key, value in model.named_parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.__dict__["_trimtab"] = state
    attentions = any(place.kind == "attention" for part, *_ in work for place in part.places)
    known = places(model) if attentions else []
    for index, (part, deltas, group) in enumerate(work):
        for place, delta, reading in zip(part.places, deltas, read[index], strict=True):
            module = model.get_submodule(place.module)
            key = adapter.name + (f"+{index}" if index else "") + site_key(place)
            stack = stack_of(model, place.module) if reads_batch(part.method) else None
            delta.train(module.training)
            install(module, place, delta, key, state, stack.path if stack else "", place.features or 0)
            if reading is not None:
                listen(model, module._modules["delta"], part.method.source, reading)  # type: ignore[arg-type]
            if place.kind == "attention":
                found: Any = module._modules["delta"]
                found.__dict__["beside"] = projections(known, module, place.module)
                found.__dict__["heads"] = heads_of(module)
            above = ancestors(model, place.module)
            if any(isinstance(outer, nn.TransformerEncoderLayer) for outer in above):
                stand_aside(module)
            for outer in above:
                if isinstance(outer, nn.TransformerEncoder) and outer.use_nested_tensor:
                    outer.use_nested_tensor = False
                    state.padded.append(outer)
        if group is not None:
            if SHARED not in model._modules:
                model.add_module(SHARED, Groups())
            shared: Any = model._modules[SHARED]
            shared[slot_name(adapter.name, part.label)] = group
    state.adapters[adapter.name] = adapter
    state.active = (*state.active, adapter.name)
    state.rows = None
    state.kept.clear()
    wanted = [place.module for part, *_ in work if reads_batch(part.method) for place in part.places]
    if wanted:
        install_hooks(model, state, wanted)


def site_key(place: Place) -> str:
    """What tells the deltas of one part on one module apart: the raw parameter and the part of a fused weight."""
    return (f"/{place.parameter}" if place.parameter else "") + (f":{place.part}" if place.part else "")


def reads_batch(method: Method) -> bool:
    """Whether a method needs to know positions: virtual tokens, or edits at prompt positions."""
    return isinstance(method, InputMethod) or getattr(method, "reads_batch", False)


def detach(model: nn.Module, name: str | None = None, where: str | None = None) -> nn.Module:
    """Take an adapter (None: all of them) off again: classes, flags and every bit of the base are as before.

    With `where` only off these sites: `detach(model, where="attn@:5, ffn@:5")` prunes the first five layers, and what
    is saved afterwards has the other sites only.
    """
    state = require_state(model, "detach")
    names = list(state.adapters) if name is None else [name]
    check_names(state, names, "detach")
    if where is not None:
        names = prune(model, state, names, where)
    for one in names:
        for _, module in list(edited_modules(model)):
            uninstall(module, one)
        shared: Any = model._modules.get(SHARED, {})
        for key in [key for key in shared if key.startswith(f"{one}/")]:
            del shared[key]
        del state.adapters[one]
    state.active = tuple(other for other in state.active if other in state.adapters)
    state.rows = None
    state.kept.clear()
    if SHARED in model._modules and not len(model._modules[SHARED]):  # type: ignore[arg-type]
        del model._modules[SHARED]
    if not any(reads_batch(part.method) for adapter in state.adapters.values() for part in adapter.parts):
        remove_hooks(state)
    if not state.adapters:
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(state.frozen.get(key, parameter.requires_grad))
        for encoder in state.padded:
            encoder.use_nested_tensor = True
        del model.__dict__["_trimtab"]
    return model


def prune(model: nn.Module, state: State, names: Sequence[str], where: str) -> list[str]:
    """Take adapters off some of their sites; returns those that are left with none."""
    gone: dict[int, list[Place]] = {}
    refusal: UserError | None = None
    parts = [(name, part) for name in names for part in state.adapters[name].parts]
    for index, (name, part) in enumerate(parts):
        try:
            chosen = {place.name for place in select(model, where, kinds=kinds_of(part.method))}
        except UserError as error:
            refusal = UserError(f"detach: {error.message}", fix=error.fix)
            continue
        gone[index] = [place for place in part.places if place.name in chosen]
        if gone[index] and isinstance(part.method, InputMethod):
            raise UserError(
                f"detach: the virtual tokens of {name} go through all layers, so it cannot leave some of them",
                fix=f"trimtab.detach(model, {name!r})",
            )
    if not any(gone.values()):
        has = listing({part.where: None for _, part in parts}, 3)
        raise refusal or UserError(f"detach: {where!r} names no site of {listing(names)}; it is at {has}")
    for index, leaving in gone.items():
        name, part = parts[index]
        slot = slot_name(name, part.label)
        for place in leaving:
            module = model.get_submodule(place.module)
            deltas: Any = module._modules["delta"]
            uninstall(
                module,
                name,
                [key for key, one in deltas.items() if one.slot == slot and key.endswith(site_key(place))],
            )
        part.places = [place for place in part.places if place not in leaving]
        if not part.places:
            state.adapters[name].parts.remove(part)
            shared: Any = model._modules.get(SHARED, {})
            if slot in shared:
                del shared[slot]
    return [name for name in names if not state.adapters[name].parts]


def activate(model: nn.Module, names: str | tuple[str, ...] | list[Any] | None) -> nn.Module:
    """Choose the adapters in use: a name, a tuple (stacked), None (the base alone), or a list of them, one per row.

    Rows of a list run through grouped products where the methods allow it, else through a loop over the adapters. What
    is stacked for the groups is forgotten here, so an adapter whose values were written past autograd's sight (`.data`)
    is read anew after it.
    """
    rearrange(model, names).kept.clear()
    return model


def rearrange(model: nn.Module, names: str | tuple[str, ...] | list[Any] | None) -> State:
    """As `activate`, but what is stacked for grouped rows stays: for loops whose rows come and go."""
    state = require_state(model, "activate")
    per_row: list[tuple[str, ...]] | None = None
    if isinstance(names, list):
        per_row = [_stacked(name) for name in names]
        flat = [name for row in per_row for name in row]
    else:
        flat = list(_stacked(names))
    check_names(state, flat, "activate")
    if per_row is not None:
        raw = [path for path, module in edited_modules(model) if hasattr(module.delta, "layouts")]
        if raw and any(d.adapter in flat for path in raw for d in model.get_submodule(path).delta.values()):  # type: ignore[operator]
            raise UserError(
                f"activate: rows of one batch cannot differ at weights that are read raw: {listing(raw, 4)}",
                fix="activate one adapter for all rows, or leave these sites out of `where`",
            )
        if not per_row:
            raise UserError("activate: an empty list names no row")
        state.rows = per_row
    else:
        state.active, state.rows = tuple(flat), None
    return state


def _stacked(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)
