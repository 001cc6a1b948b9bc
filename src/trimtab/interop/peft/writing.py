"""Adapters of ours as PEFT's files; what PEFT cannot represent is refused with the reason."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.draw import site_at
from trimtab.core.errors import listing
from trimtab.core.files import write_together
from trimtab.core.raw import Fields
from trimtab.core.registry import name_of
from trimtab.core.save import plain_class
from trimtab.core.state import State
from trimtab.core.tensor_file import write_tensors
from trimtab.interop.peft import copies, lora, prompts
from trimtab.interop.peft.files import CONFIG, PREFIX, ROOT, WEIGHTS
from trimtab.interop.peft.row import Row, Tensors, refuse
from trimtab.interop.peft.table import row_for
from trimtab.interop.saved import Saved, SavedPart, SavedSite

TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""How a model's class is called -> PEFT's word for its task."""


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
        config, by_path = lora.write_lora(loras, biases, modules_at(model, paths), sizes_at(model, loras))
        biases = {}
    elif main == "prompt":
        config, root = prompts.write_prompt(model, prompts.only(of["prompt"], "prompt tuning"))
    elif main == "prefix":
        config, root = prompts.write_prefix(model, prompts.only(of["prefix"], "prefix tuning"))
    elif main == "adaption":
        config, by_path = prompts.write_adaption(model, prompts.only(of["adaption"], "LLaMAAdapter"))
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
    if lora.is_lora(part.method):
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
    return any(copies.covers(model, site.place, site.tensors, part) for site in rows.sites)


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
        whole |= copies.write_copies(model, part)
    for part in of.get("norms", []):
        whole |= copies.write_norms(model, part)
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
        biases = copies.write_biases(model, part)
        if main != "lora":
            raise refuse("BitFit" if main is None else f"BitFit beside {main}", "PEFT trains biases beside LoRA only")
        config["bias"] = "lora_only" if set(biases) <= set(by_path) else "all"
        for path, b in biases.items():
            under = "lora_A.weight" in by_path.get(path, {})
            by_path.setdefault(path, {})["base_layer.bias" if under else "bias"] = b
    for part in rows:
        told, tensors = copies.write_rows(model, part, heads)
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
