"""Merging: fold the deltas of adapters into the frozen weights, exactly where the format allows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.attach import detach
from trimtab.core.code import Code
from trimtab.core.delta import Cast, Delta
from trimtab.core.deltas import Deltas, edited_modules
from trimtab.core.errors import UserError, listing
from trimtab.core.hosts import plain_base
from trimtab.core.install import uninstall
from trimtab.core.method import WeightMethod
from trimtab.core.places import Place
from trimtab.core.quantized import dequantize_module, quantize_module
from trimtab.core.raw import RawDeltas, edit_raw
from trimtab.core.site import RawBase, is_conv1d
from trimtab.core.state import check_names, require_state

POLICIES = ("exact", "dense", "requantize")


def merge(model: nn.Module, name: str | None = None, *, quantized: str = "exact") -> nn.Module:
    """Fold adapters (None: all active ones) into the frozen weights and take them off; returns the model.

    W <- weight(W, p), b <- bias(b, p), computed in fp32 at least and rounded once. On a quantized weight `quantized`
    decides: `exact` (the method folds into scales or zero points, else an error), `dense` (the weight becomes dense) or
    `requantize` (encoded again in its own format: lossy). A tied weight is untied, so its other user keeps its values.
    Errors: a part that is not mergeable, with its reason; nothing is changed then.
    """
    state = require_state(model, "merge")
    if quantized not in POLICIES:
        raise UserError(f"merge: quantized={quantized!r}", fix=f"one of {listing(POLICIES)}")
    names = list(state.active) if name is None else [name]
    check_names(state, names, "merge")
    work = [(path, module) for path, module in edited_modules(model) if mine(module, names)]
    refuse(model, work, names, quantized)
    tied = tied_parameters(model)
    untied = any(id(parameter) in tied for _, module in work for parameter in module._parameters.values())
    with torch.no_grad():
        for _, module in work:
            fold(module, names, quantized, tied)
    if untied:
        config: Any = getattr(model, "config", None)
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
    for one in names:
        detach(model, one)
    return model


def refuse(model: nn.Module, work: Sequence[tuple[str, nn.Module]], names: Sequence[str], quantized: str) -> None:
    """Raise one error with everything that stands against a merge."""
    state = require_state(model, "merge")
    problems = []
    for one in names:
        for part in state.adapters[one].parts:
            if not part.method.mergeable:
                reason = part.method.laws.get("merge", "it has no weight of its own")
                problems.append(f"{type(part.method).__name__} of adapter {one!r} cannot be merged: {reason}")
    if problems:
        raise UserError(f"merge: {listing(problems)}", fix="keep it as an adapter, or merge only the others by name")
    for path, module in work:
        deltas: Any = module.delta
        others = [delta.adapter for delta in deltas.values() if delta.adapter not in names]
        order = [delta.adapter in names for delta in deltas.values()]
        if order != sorted(order, reverse=True):
            problems.append(f"{path} has adapter {others[0]!r} below the merged one")
        code = module._modules.get("code")
        if code is None:
            continue
        if quantized == "exact" and exact(module, mine(module, names)) is None:
            problems.append(f"{path} is quantized ({code.format}) and the method has no exact merge into it")
        elif quantized != "exact" and others:
            problems.append(f"{path} is quantized and adapter {others[0]!r} stays on it")
    if problems:
        raise UserError(
            f"merge: {listing(problems, 4)}",
            fix='quantized="dense" (bigger, faithful) or quantized="requantize" (small, lossy); detach what stays',
        )


def mine(module: nn.Module, names: Sequence[str]) -> list[Delta]:
    """The deltas of these adapters on a module, in order."""
    deltas: Any = module.delta
    return [delta for delta in deltas.values() if delta.adapter in names]


def exact(module: nn.Module, deltas: Sequence[Delta]) -> dict[str, Tensor] | None:
    """The tensors of a quantized weight after folding `deltas` into them exactly, or None."""
    code: Any = module._modules["code"]
    tensors: dict[str, Tensor] = {}
    for delta in deltas:
        method = delta.method
        if delta.rows is not None or not isinstance(method, WeightMethod):
            return None
        new = method.merge(code.with_tensors(tensors) if tensors else code, Cast(delta, torch.float32))
        if new is None:
            return None
        tensors |= new
    return tensors


def fold(module: nn.Module, names: Sequence[str], quantized: str, tied: set[int]) -> None:
    """Merge into one module, dense or quantized, and take the deltas off it."""
    deltas: Deltas = module.delta  # type: ignore[assignment]
    chosen = mine(module, names)
    code: Code | None = module._modules.get("code")  # type: ignore[assignment]
    if isinstance(deltas, RawDeltas):
        values: dict[str, Tensor | None] = {}
        for layout in dict.fromkeys(deltas.layouts.values()):
            stored, b = module._parameters[layout.name], layout.bias(module)
            assert stored is not None
            W = wide(layout.canonical(stored))
            for key, delta in deltas.items():
                if delta in chosen and deltas.layouts[key] == layout:
                    W, b = edit_raw(delta, W, b, layout)
            values |= {layout.name: layout.stored(W, stored), layout.bias_name or "": b}
    elif code is not None and quantized == "exact":
        b = folded(module, chosen)[1]
        code.update(exact(module, chosen) or {})
        values = {"bias": b}
    else:
        W, b = folded(module, chosen)
        turned = is_conv1d(module) or isinstance(module, nn.Embedding)
        values = {"weight": W.mT if turned else W, "bias": b}
    for name in names:
        if any(delta.adapter == name for delta in chosen):
            uninstall(module, name)
    if code is not None and quantized != "exact":
        dequantize_module(module)
    for key, value in values.items():
        if value is not None and key:
            write(module, key, value, tied)
    if code is not None and quantized == "requantize":
        quantize_module(module, code.format)


def folded(module: nn.Module, deltas: Sequence[Delta]) -> tuple[Tensor, Tensor | None]:
    """Canonical weight and bias of a module with `deltas` applied, in fp32 at least."""
    base = plain_base(module, Place(""), 0)
    W, b = wide(base.weight), base.bias
    b = None if b is None else wide(b)
    for delta in deltas:
        W, b = delta.effective(RawBase(W, b), delta.rows)
    return W, b


def write(module: nn.Module, key: str, value: Tensor, tied: set[int]) -> None:
    """Store a merged parameter: in place, or as a new one where it was tied or missing."""
    old = module._parameters.get(key)
    if old is None:
        anchor = next(module.parameters())
        dtype = anchor.dtype if anchor.is_floating_point() else value.dtype
        module.register_parameter(key, nn.Parameter(value.to(dtype), requires_grad=False))
    elif id(old) in tied:
        fresh = value.to(old.dtype).reshape(old.shape).clone()
        module._parameters[key] = nn.Parameter(fresh, requires_grad=old.requires_grad)
    else:
        old.data.copy_(value.reshape(old.shape))


def wide(W: Tensor) -> Tensor:
    """At least fp32, and never the stored tensor itself changed."""
    return W.float() if W.dtype in (torch.bfloat16, torch.float16) else W


def tied_parameters(model: nn.Module) -> set[int]:
    """Ids of parameters that more than one module holds."""
    seen: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    return {key for key, count in seen.items() if count > 1}
