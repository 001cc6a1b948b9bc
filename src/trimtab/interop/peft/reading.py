"""PEFT's files as adapters of ours; an error lists all that answers to nothing, and nothing is attached then."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.draw import site_at
from trimtab.core.errors import UserError, listing, nearest
from trimtab.core.places import Place
from trimtab.core.registry import find, make
from trimtab.core.save import plain_class
from trimtab.core.state import State
from trimtab.interop.peft import copies, lora, prompts
from trimtab.interop.peft.files import PREFIX, ROOT, read_config, read_weights
from trimtab.interop.peft.row import GROUP, Layer, Row, Tensors, refuse
from trimtab.interop.peft.table import PROMPTS, row_of
from trimtab.interop.saved import Draft, Saved, assemble, places_by_path

ROWS_KEYS = ("token_adapter.trainable_tokens_delta", "trainable_tokens_delta")


def from_peft(model: nn.Module, directory: str | Path, name: str = "default") -> Saved:
    """A PEFT adapter as one of ours, for this model."""
    config, weights = read_config(directory), read_weights(directory)
    kind = config["peft_type"]
    notes = {"from": f"PEFT {kind}", "base_model": config.get("base_model_name_or_path")}
    drafts = read_prompts(model, config, weights) if kind in PROMPTS[:3] else read_layers(model, config, weights)
    return assemble(model, drafts, name=name, notes=notes)


def read_prompts(model: nn.Module, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> list[Draft]:
    """Prompt learning: one tensor at the root, and whole modules."""
    rest = {key: value for key, value in weights.items() if key != "prompt_embeddings"}
    if "prompt_embeddings" not in weights:
        raise UserError(f"PEFT: {config['peft_type']} without prompt_embeddings; it has {listing(weights, 5)}")
    read = prompts.read_prefix if config["peft_type"] == "PREFIX_TUNING" else prompts.read_prompt
    drafts = read(model, config, weights["prompt_embeddings"])
    if rest:
        whole = {PREFIX + key.removeprefix(ROOT).removeprefix("model."): value for key, value in rest.items()}
        known = dict(model.named_modules())
        fixed = {
            key if split(key.removeprefix(PREFIX), known) else key.replace(PREFIX, PREFIX + "model.", 1): value
            for key, value in whole.items()
        }
        drafts += read_layers(model, config, fixed)
    return drafts


def read_layers(model: nn.Module, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> list[Draft]:
    """The drafts of everything that sits at modules; one error for all that does not fit."""
    row = row_of(config)
    check_fixed(row, config)
    problems: list[str] = []
    by_module, shared = sorted_out(model, weights, row, problems)
    drop_repeated(model, by_module)
    known, modules = places_by_path(model), dict(model.named_modules())
    layers, copies, gates = [], list[Draft](), dict[str, Tensors]()
    for path, depth in by_module:
        tensors = by_module[path, depth]
        if any(name.startswith("adaption_") for name in tensors):
            gates[path] = tensors
            continue
        place = place_at(model, known, path, depth, tensors, config)
        if place is None:
            named = [path + ".base_layer" * depth + f".{name}" for name in tensors]
            problems += [
                no_module(f"{PREFIX}{name}", tensors[own], modules) for name, own in zip(named, tensors, strict=True)
            ]
            continue
        names = sorted_names(tensors, row, config)
        problems += [f"unexpected {PREFIX}{path}.{name} {tuple(tensors[name].shape)}" for name in names["unknown"]]
        copies += copied(model, place, tensors, config)
        if names["own"] or names["other"]:
            shape = site_at(model, State(), place).base.shape
            layer = Layer(place, shape, tensors, config, shared, model.get_submodule(place.module))
            missing = lacking(row, names["own"], config)
            problems += [f"missing {PREFIX}{path}.{name}" for name in missing]
            if not missing:
                layers.append(layer)
    if problems:
        raise UserError(
            f"PEFT: the adapter does not fit this {plain_class(model)} ({len(problems)} problems):\n    "
            + "\n    ".join(problems)
        )
    drafts = copies
    if gates:
        drafts += prompts.read_adaption(model, gates)
    if layers:
        drafts += lora.read_lora(layers, config) if row is None else read_row(row, layers, config, shared)
    if not drafts:
        raise UserError("PEFT: the adapter is empty")
    return drafts


def check_fixed(row: Row | None, config: Mapping[str, Any]) -> None:
    """Refuse settings that mean another computation than ours."""
    wanted = {} if row is None else row.fixed
    odd = [f"{key}={config[key]}" for key, value in wanted.items() if config.get(key, value) not in (value, None)]
    if odd:
        raise refuse(f"{config['peft_type']} with {listing(odd)}", "this has no counterpart here")


def sorted_out(
    model: nn.Module, weights: Mapping[str, Tensor], row: Row | None, problems: list[str]
) -> tuple[dict[tuple[str, int], Tensors], Tensors]:
    """The tensors by (module path, nesting of wrappers), and those at the root by our names."""
    modules = dict(model.named_modules())
    by_module: dict[tuple[str, int], Tensors] = {}
    shared: Tensors = {}
    for key, value in weights.items():
        root = key.removeprefix(ROOT)
        if row is not None and root in row.shared:
            shared[row.shared[root]] = value
            continue
        found = split(key.removeprefix(PREFIX), modules) if key.startswith(PREFIX) else None
        if found is None:
            problems.append(no_module(key, value, modules))
            continue
        path, depth, name = found
        by_module.setdefault((path, depth), {})[name] = value
    return by_module, shared


def no_module(key: str, value: Tensor, modules: Mapping[str, nn.Module]) -> str:
    """That a tensor has no module to go to, and the module most like the one it names."""
    path = re.sub(r"\.(lora|[a-z0-9]+)_[A-Za-z0-9_]+(\.weight|\.bias)?$", "", key.removeprefix(PREFIX))
    close = nearest(path, [name for name, module in modules.items() if module._parameters], 1)
    return f"no module for {key} {tuple(value.shape)}" + (f" (nearest: {close[0]})" if close else "")


def drop_repeated(model: nn.Module, by_module: dict[tuple[str, int], Tensors]) -> None:
    """Take away what PEFT writes twice: trained tokens at modules that share a weight, biases of its own wrappers."""
    seen: dict[int, Tensor] = {}
    ask: Any = getattr(model, "get_input_embeddings", lambda: None)
    first = sorted(by_module, key=lambda key: model.get_submodule(key[0]) is not ask())
    for path, depth in first:
        tensors = by_module[path, depth]
        weight = model.get_submodule(path)._parameters.get("weight")
        for name in list(tensors):
            known = seen.get(id(weight)) if name in ROWS_KEYS and weight is not None else None
            if name.startswith(("modules_to_save.", "original_module.")) or (
                known is not None and torch.equal(known, tensors[name])
            ):
                del tensors[name]
            elif name in ROWS_KEYS and weight is not None:
                seen[id(weight)] = tensors[name]
    for key in [key for key, tensors in by_module.items() if not tensors]:
        del by_module[key]


def split(key: str, modules: Mapping[str, nn.Module]) -> tuple[str, int, str] | None:
    """(module path, wrappers in between, name at the module) of a key without its prefix, or None."""
    names = key.split(".")
    clean: list[str] = []
    depth, end = 0, 0
    for index, name in enumerate(names):
        if ".".join([*clean, name]) in modules:
            clean.append(name)
            end = index + 1
        elif name == "base_layer" and index == end and index < len(names) - 2:
            depth, end = depth + 1, index + 1
        else:
            break
    rest = ".".join(names[end:])
    return (".".join(clean), depth, rest) if clean and rest else None


def place_at(
    model: nn.Module,
    known: Mapping[str, Place],
    path: str,
    depth: int,
    tensors: Tensors,
    config: Mapping[str, Any],
) -> Place | None:
    """The place of a module, or of the raw parameter of it that wrapper number `depth` holds."""
    if path in known:
        return known[path]
    inside = [place for place in known.values() if place.module == path and place.parameter is not None]
    targets = [str(one) for one in config.get("target_parameters") or []]
    meant = [
        place for target in targets for place in inside if place.name == target or place.name.endswith(f".{target}")
    ]
    order = list(dict.fromkeys(place.name for place in meant)) or [place.name for place in inside]
    fitting = [one for one in meant or inside if fits(model, one, tensors)]
    wanted = order[len(order) - 1 - depth] if depth < len(order) else None
    named = [one for one in fitting if one.name == wanted]
    return next(iter(named or fitting), None)


def fits(model: nn.Module, place: Place, tensors: Tensors) -> bool:
    """Whether a LoRA pair has the sizes of a raw parameter."""
    A, B = tensors.get("lora_A.weight"), tensors.get("lora_B.weight")
    out, into = site_at(model, State(), place).base.shape
    return A is not None and B is not None and A.shape[1] == into and B.shape[0] == out


def sorted_names(tensors: Tensors, row: Row | None, config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names at a module by what they are: the method's own, needed beside them, copies, unknown."""
    own = lora.NAMES if row is None else frozenset(row.tensors)
    other = frozenset() if row is None else row.ignored
    copied = {"base_layer.weight", "base_layer.bias", *ROWS_KEYS, *copies.COPIED}
    copied |= {f"ln_tuning_layers.{name}" for name in copies.COPIED}
    if row is None and config["peft_type"] != "LORA":
        own = frozenset()
    found: dict[str, list[str]] = {"own": [], "other": [], "unknown": []}
    for name in tensors:
        kind = "own" if name in own else "other" if name in other else "copy" if name in copied else "unknown"
        if kind != "copy":
            found[kind].append(name)
    return found


def lacking(row: Row | None, own: Sequence[str], config: Mapping[str, Any]) -> list[str]:
    """Names that a layer should have and has not."""
    if row is not None:
        return [name for name in row.tensors if name not in own and name not in row.optional]
    if any("embedding" in name for name in own):
        return [name for name in ("lora_embedding_A", "lora_embedding_B") if name not in own]
    return [name for name in ("lora_A.weight", "lora_B.weight") if name not in own]


def copied(model: nn.Module, place: Place, tensors: Tensors, config: Mapping[str, Any]) -> list[Draft]:
    """What a module holds beside an adapter's own tensors."""
    drafts = []
    whole = {name: tensors[name] for name in copies.COPIED if name in tensors}
    norm = "ln_tuning_layers."
    whole |= {name.removeprefix(norm): value for name, value in tensors.items() if name.startswith(norm)}
    if whole:
        drafts += copies.read_copy(model, place, whole)
    drafts += copies.read_base_layer(model, place, tensors)
    for key in ROWS_KEYS:
        if key in tensors:
            drafts += copies.read_rows(model, place, tensors[key], config)
    return drafts


def read_row(row: Row, layers: Sequence[Layer], config: Mapping[str, Any], shared: Tensors) -> list[Draft]:
    """The drafts of the layers of one method, by its row of the table."""
    cls = find(row.method)
    fields: dict[str, Any] = {one.name: one.default for one in dataclasses.fields(cls)}
    settings, tensors = [], []
    for layer in layers:
        path = layer.place.module
        made: dict[str, Any] = {}
        for name, key in row.settings.items():
            value = lora.setting(config, path, key, row.patterns.get(name, ""))
            if value is not None:
                made[name] = type(fields[name])(value) if isinstance(fields[name], int | float) else value
        mine = {ours: layer.tensors[theirs] for theirs, ours in row.tensors.items() if theirs in layer.tensors}
        reading = (made, mine, layer.shared)
        one, held, used = reading if row.read is None else row.read(layer, reading)
        settings.append(one)
        tensors.append((held, used))
    settings = row.gather(layers, settings) if row.gather else settings
    drafts = []
    for layer, one, (held, used) in zip(layers, settings, tensors, strict=True):
        group = one.get(GROUP)
        method = make(cls, {key: value for key, value in one.items() if key != GROUP})
        drafts.append(Draft(layer.place, method, held, {} if row.share else used, group))
    if row.share:
        groups: dict[Any, list[int]] = {}
        for index, draft in enumerate(drafts):
            groups.setdefault((draft.method, draft.group), []).append(index)
        for members in groups.values():
            drafts[members[0]].shared = row.share([layers[index] for index in members], shared)
    return drafts
