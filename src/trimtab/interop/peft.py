"""Adapters of Hugging Face PEFT: `adapter_config.json` and `adapter_model.safetensors`, read and written.

Strict both ways: a tensor that answers to nothing, a module that is not there, a setting that means another
computation is an error that lists all of them, and nothing is attached or written then. What no file holds is not
guessed.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.draw import site_at
from trimtab.core.errors import UserError, listing, nearest
from trimtab.core.files import write_together
from trimtab.core.places import Place
from trimtab.core.raw import Fields
from trimtab.core.registry import find, make, name_of
from trimtab.core.save import plain_class
from trimtab.core.state import State
from trimtab.core.tensor_file import write_tensors
from trimtab.interop import peft_copies, peft_lora, peft_prompts
from trimtab.interop.peft_table import GROUP, PROMPTS, Layer, Row, Tensors, known_types, refuse, row_for, row_of
from trimtab.interop.saved import Draft, Saved, SavedPart, SavedSite, assemble, places_by_path

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX, ROOT = "base_model.model.", "base_model."
ROWS_KEYS = ("token_adapter.trainable_tokens_delta", "trainable_tokens_delta")
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""How a model's class is called -> PEFT's word for its task."""


def is_peft(directory: str | Path) -> bool:
    """Whether a directory holds a PEFT adapter."""
    return (Path(directory) / CONFIG).is_file()


# ----------------------------------------------------------------------------------------------------------- reading


def read_config(directory: str | Path) -> dict[str, Any]:
    """The config of a PEFT directory, of a type that is read."""
    path = Path(directory) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"PEFT: {path} cannot be read: {error}") from None
    if not isinstance(config, dict) or "peft_type" not in config:
        raise UserError(f"PEFT: {path} names no peft_type")
    if config["peft_type"] not in known_types():
        raise refuse(
            f"peft_type {config['peft_type']}",
            f"there is no counterpart here; there is for {listing(known_types(), 40)}",
        )
    return config


def read_weights(directory: str | Path) -> dict[str, Tensor]:
    """The tensors of a PEFT directory."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(directory)
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / PICKLED).is_file():
            raise refuse(
                f"{folder / PICKLED}", "it is a pickle, which can run code when read", "save it again as safetensors"
            )
        raise UserError(f"PEFT: no {WEIGHTS} in {folder}")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"PEFT: {path} cannot be read: {error}") from None


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
    read = peft_prompts.read_prefix if config["peft_type"] == "PREFIX_TUNING" else peft_prompts.read_prompt
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
        drafts += peft_prompts.read_adaption(model, gates)
    if layers:
        drafts += peft_lora.read_lora(layers, config) if row is None else read_row(row, layers, config, shared)
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
    own = peft_lora.NAMES if row is None else frozenset(row.tensors)
    other = frozenset() if row is None else row.ignored
    copies = {"base_layer.weight", "base_layer.bias", *ROWS_KEYS, *peft_copies.COPIED}
    copies |= {f"ln_tuning_layers.{name}" for name in peft_copies.COPIED}
    if row is None and config["peft_type"] != "LORA":
        own = frozenset()
    found: dict[str, list[str]] = {"own": [], "other": [], "unknown": []}
    for name in tensors:
        kind = "own" if name in own else "other" if name in other else "copy" if name in copies else "unknown"
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
    whole = {name: tensors[name] for name in peft_copies.COPIED if name in tensors}
    norm = "ln_tuning_layers."
    whole |= {name.removeprefix(norm): value for name, value in tensors.items() if name.startswith(norm)}
    if whole:
        drafts += peft_copies.read_copy(model, place, whole)
    drafts += peft_copies.read_base_layer(model, place, tensors)
    for key in ROWS_KEYS:
        if key in tensors:
            drafts += peft_copies.read_rows(model, place, tensors[key], config)
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
            value = peft_lora.setting(config, path, key, row.patterns.get(name, ""))
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


# ----------------------------------------------------------------------------------------------------------- writing


def to_peft(model: nn.Module, saved: Saved, *, base: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An adapter of ours as PEFT's config and tensors. `model` is its base, without adapters.

    What PEFT cannot represent is refused with the reason.
    """
    parts = [baked(part) for part in saved.parts]
    kinds = {part.label: kind_of(part) for part in parts}
    of = {kind: [part for part in parts if kinds[part.label] == kind] for kind in sorted(set(kinds.values()))}
    unknown = of.get("", [])
    if unknown:
        names = listing(sorted({type(part.method).__name__ for part in unknown}))
        raise refuse(
            names, "PEFT has no such method", "trimtab convert ADAPTER --to lora, where the change is a weight's"
        )
    config: dict[str, Any] = {}
    by_path: dict[str, Tensors] = {}
    root: dict[str, Tensor] = {}
    rows = of.get("rows", [])
    loras = of.get("lora", [])
    heads = [part for part in loras if rows and any(covered(model, one, part) for one in rows)]
    loras = [part for part in loras if part not in heads]
    biases = {site.place.module: site.tensors["d"] for part in of.get("offsets", []) for site in part.sites}
    mains = [kind for kind in ("lora", "prompt", "prefix", "adaption", *sorted({row.peft for row in table(parts)}))]
    mains = [kind for kind in mains if (loras if kind == "lora" else of.get(kind))]
    if len(mains) > 1:
        raise refuse(" and ".join(mains), "one PEFT adapter is of one type")
    main = mains[0] if mains else None
    if main == "lora":
        paths = {place.whole for part in loras for place in (site.place for site in part.sites)}
        if biases and not set(biases) <= paths:
            raise refuse("OutputBias beside LoRA", "PEFT adds a bias only where it has a LoRA")
        config, by_path = peft_lora.write_lora(loras, biases, modules_at(model, paths), sizes_at(model, loras))
        biases = {}
    elif main == "prompt":
        config, root = peft_prompts.write_prompt(model, peft_prompts.only(of["prompt"], "prompt tuning"))
    elif main == "prefix":
        config, root = peft_prompts.write_prefix(model, peft_prompts.only(of["prefix"], "prefix tuning"))
    elif main == "adaption":
        config, by_path = peft_prompts.write_adaption(model, peft_prompts.only(of["adaption"], "LLaMAAdapter"))
    elif main is not None:
        config, by_path, root = write_rows(model, of[main])
    if biases:
        if main is not None:
            raise refuse(f"OutputBias beside {main}", "PEFT has no biases beside it")
        config, by_path, root = write_rows(model, of["offsets"])
        main = "BEFT"
    config, by_path = add_copies(model, of, rows, heads, config, by_path, main)
    flat = {f"{PREFIX}{path}.{name}": value for path, held in by_path.items() for name, value in held.items()}
    flat |= {key if "prompt_embeddings" in key else ROOT + key: value for key, value in root.items()}
    return common(model, base) | config, {key: flat[key].contiguous() for key in sorted(flat)}


def kind_of(part: SavedPart) -> str:
    """What a part is to PEFT: `lora`, a prompt, a copy, or the type of its row; "" where it has none."""
    if peft_lora.is_lora(part.method):
        return "lora"
    name = name_of(type(part.method))
    fixed = {
        "prompt_tuning": "prompt",
        "prefix_tuning": "prefix",
        "llama_adapter": "adaption",
        "full": "copies",
        "ln_tuning": "norms",
        "embedding_rows": "rows",
        "bit_fit": "biases",
        "output_bias": "offsets",
    }
    row = row_for(name)
    return fixed.get(name) or (row.peft if row else "")


def table(parts: Sequence[SavedPart]) -> list[Row]:
    """The rows of the parts that have one."""
    found = [row_for(name_of(type(part.method))) for part in parts]
    return [row for row in found if row is not None and row.method != "output_bias"]


def covered(model: nn.Module, rows: SavedPart, part: SavedPart) -> bool:
    """Whether a LoRA part only repeats trained tokens at the tied head."""
    return any(peft_copies.covers(model, site.place, site.tensors, part) for site in rows.sites)


def baked(part: SavedPart) -> SavedPart:
    """A part without the network that makes its prompt."""
    done = [part.method.bake(Fields(site.tensors, Fields(part.shared))) for site in part.sites]
    if not done or any(one is None for one in done):
        return part
    with torch.no_grad():
        sites = [
            dataclasses.replace(site, tensors={key: value.detach() for key, value in one[1].items()})
            for site, one in zip(part.sites, done, strict=True)
        ]
    return dataclasses.replace(part, method=done[0][0], sites=sites, shared={})


def modules_at(model: nn.Module, paths: Iterable[str]) -> dict[str, Any]:
    known = dict(model.named_modules())
    return {path: known.get(path, known.get(path.rpartition(".")[0])) for path in paths}


def sizes_at(model: nn.Module, parts: Sequence[SavedPart]) -> dict[str, int]:
    """Path -> output rows of the whole weight of every site."""
    found = {}
    for part in parts:
        for site in part.sites:
            whole = dataclasses.replace(site.place, part=None, rows=None)
            found[site.place.whole] = site_at(model, State(), whole).base.shape[0]
    return found


def write_rows(model: nn.Module, parts: Sequence[SavedPart]) -> tuple[dict[str, Any], dict[str, Tensors], Tensors]:
    """Config, tensors by path and tensors at the root, by the row of the table; odd settings become patterns."""
    row = row_for(name_of(type(parts[0].method)))
    assert row is not None
    configs: dict[str, dict[str, Any]] = {}
    by_path: dict[str, Tensors] = {}
    root: Tensors = {}
    for part in parts:
        if name_of(type(part.method)) != row.method:
            raise refuse(f"{row.peft} of two kinds", "one PEFT adapter is of one kind")
        for site in part.sites:
            path = site.place.module
            check_site(model, row, part, site)
            settings = {key: getattr(part.method, name) for name, key in row.settings.items()}
            held = {theirs: site.tensors[ours] for theirs, ours in row.tensors.items() if ours in site.tensors}
            writing = (settings, held)
            configs[path], by_path[path] = writing if row.write is None else row.write(part, site, writing)
        if row.shared:
            mine = row.unshare(part) if row.unshare else {key: part.shared[ours] for key, ours in row.shared.items()}
            if any(key in root and not torch.equal(root[key], value) for key, value in mine.items()):
                raise refuse(f"{row.peft} of two parts", "one PEFT adapter has one set of shared tensors")
            root |= mine
    config = together(row, configs)
    return config | {"peft_type": row.peft, "target_modules": list(configs)} | dict(row.constant), by_path, root


def check_site(model: nn.Module, row: Row, part: SavedPart, site: SavedSite) -> None:
    """Refuse what PEFT has no names for: rows of a fused weight, raw parameters, GPT-2's layers for some methods."""
    name = f"{type(part.method).__name__} at {site.place.name}"
    if site.place.rows is not None:
        raise refuse(name, "PEFT does not divide a fused weight", "where='qkv' trains the whole of it")
    if site.place.parameter is not None:
        raise refuse(name, "PEFT does not reach a weight that is read raw")
    if not row.conv1d and hasattr(model.get_submodule(site.place.module), "nf"):
        raise refuse(name, f"PEFT has no {row.peft} for GPT-2's Conv1D")


def together(row: Row, configs: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """One config of those of all modules: the usual value, and a pattern for the others where PEFT has one."""
    patterns = {key: pattern for name, pattern in row.patterns.items() for key in (row.settings[name],)}
    merged: dict[str, Any] = {}
    for key in dict.fromkeys(key for config in configs.values() for key in config):
        values = [config.get(key) for config in configs.values()]
        if key == "feedforward_modules":
            merged[key] = [path for one in values for path in one or []]
            continue
        most = max(values, key=values.count)
        odd = {path: config.get(key) for path, config in configs.items() if config.get(key) != most}
        merged[key] = most
        if odd and key not in patterns:
            raise refuse(f"{row.peft} with several values of {key}", "one PEFT adapter has one")
        if odd:
            merged[patterns[key]] = odd
    if row.peft == "IA3":
        merged.setdefault("feedforward_modules", [])
    return merged


def add_copies(
    model: nn.Module,
    of: Mapping[str, Sequence[SavedPart]],
    rows: Sequence[SavedPart],
    heads: Sequence[SavedPart],
    config: dict[str, Any],
    by_path: dict[str, Tensors],
    main: str | None,
) -> tuple[dict[str, Any], dict[str, Tensors]]:
    """Whole modules, norms, biases and trained tokens: beside another method, or alone."""
    whole: dict[str, Tensors] = {}
    kinds = {site.place.module: site.place.kind for found in of.values() for part in found for site in part.sites}
    for part in of.get("copies", []):
        whole |= peft_copies.write_copies(model, part)
    for part in of.get("norms", []):
        whole |= peft_copies.write_norms(model, part)
    norms = [path for path in whole if kinds[path] == "norm"]
    if norms and main is None and not rows:
        inner = {path: {f"ln_tuning_layers.{name}": value for name, value in whole[path].items()} for path in norms}
        config |= {"peft_type": "LN_TUNING", "target_modules": norms}
        by_path, main = by_path | inner, "LN_TUNING"
        whole = {path: held for path, held in whole.items() if path not in norms}
    if whole:
        if main is None and not rows:
            raise refuse("Full alone", "PEFT saves whole modules beside another method only")
        config["modules_to_save"] = list(whole)
        by_path = by_path | whole
    for part in of.get("biases", []):
        biases = peft_copies.write_biases(model, part)
        if main != "lora":
            raise refuse("BitFit" if main is None else f"BitFit beside {main}", "PEFT trains biases beside LoRA only")
        config["bias"] = "lora_only" if set(biases) <= set(by_path) else "all"
        for path, b in biases.items():
            under = "lora_A.weight" in by_path.get(path, {})
            by_path.setdefault(path, {})["base_layer.bias" if under else "bias"] = b
    for part in rows:
        told, tensors = peft_copies.write_rows(model, part, heads)
        if main == "lora":
            config |= told
            for path, held in tensors.items():
                rows_in = {f"token_adapter.{name}": value for name, value in held.items()}
                by_path[path] = by_path.get(path, {}) | rows_in
        elif main is None and len(tensors) == 1 and len(rows) == 1:
            (path,) = tensors
            indices = told["trainable_token_indices"][path]
            config |= {"peft_type": "TRAINABLE_TOKENS", "target_modules": [path], "token_indices": indices}
            by_path = by_path | tensors
        else:
            raise refuse(f"EmbeddingRows beside {main}", "PEFT trains tokens alone or beside LoRA")
    return config, by_path


def common(model: nn.Module, base: str | None) -> dict[str, Any]:
    """The keys of every PEFT config."""
    name = plain_class(model)
    task = next((task for ending, task in TASKS.items() if name.endswith(ending)), None)
    found: dict[str, Any] = {
        "base_model_name_or_path": base or getattr(getattr(model, "config", None), "_name_or_path", "") or None,
        "task_type": task,
        "inference_mode": True,
        "revision": None,
    }
    if task is None:
        found["auto_mapping"] = {"base_model_class": name, "parent_library": type(model).__module__}
    return found


def write_peft(model: nn.Module, saved: Saved, directory: str | Path, *, base: str | None = None) -> Path:
    """Write an adapter of ours as a PEFT directory: both files or none; no tensor stands in it twice."""
    config, tensors = to_peft(model, saved, base=base)
    if "target_modules" in config and config["peft_type"] != "ADAPTION_PROMPT":
        config |= shortened(model, config)
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    weights = partial(write_tensors, tensors=tensors, metadata={"format": "pt"})
    write_together(Path(directory), {WEIGHTS: weights, CONFIG: text.encode()})
    return Path(directory)


def shortened(model: nn.Module, config: Mapping[str, Any]) -> dict[str, list[str]]:
    """The lists of modules of a config by the ends of their paths, where these mean exactly the same."""
    inner, targets = list(config.get("feedforward_modules", [])), list(config["target_modules"])
    found = {"target_modules": shortest(model, targets), "feedforward_modules": shortest(model, inner)}
    rest = shortest(model, [path for path in targets if path not in inner])
    if not inner:
        return {"target_modules": found["target_modules"]}
    clear = set(found["feedforward_modules"]) <= set(found["target_modules"]) - set(rest)
    return found if clear else {}


def shortest(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Ends of paths that mean exactly these modules, where there are such; else the paths themselves."""
    ends = {path.rpartition(".")[2] for path in paths}
    meant = {path for path, _ in model.named_modules() if path.rpartition(".")[2] in ends}
    return sorted(ends) if meant == set(paths) else list(paths)
