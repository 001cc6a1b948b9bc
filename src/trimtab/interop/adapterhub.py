"""Adapters of AdapterHub: bottlenecks, LoRA and IA3, prefixes and ReFT, read.

A directory holds `adapter_config.json`, whose `config` names the architecture, and `adapter.safetensors`; a pickled
`pytorch_adapter.bin` is not read. Tensors stand under the modules of the model with the adapter's name in between:
`bert.encoder.layer.0.output.adapters.NAME.adapter_down.0.weight`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError, listing
from trimtab.core.places import Place
from trimtab.core.registry import find
from trimtab.core.save import plain_class
from trimtab.core.select import select
from trimtab.interop.peft.prompts import layers_of, rotation, turned
from trimtab.interop.saved import Draft, Saved, assemble, places_by_path

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "swish": "silu", "silu": "silu"}
Held = dict[str, Tensor]


def is_adapterhub(directory: str | Path) -> bool:
    """Whether a directory holds an adapter of AdapterHub."""
    try:
        config = json.loads((Path(directory) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and isinstance(config.get("config"), dict) and "peft_type" not in config


def refuse(what: str, why: str, fix: str | None = None) -> UserError:
    return UserError(f"AdapterHub: {what}: {why}", fix=fix)


def from_adapterhub(model: nn.Module, directory: str | Path, name: str = "default") -> Saved:
    """An adapter of AdapterHub as one of ours, for this model."""
    folder = Path(directory)
    told: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config, own = told["config"], str(told.get("name", ""))
    kind = config.get("architecture") or ("bottleneck" if "mh_adapter" in config else None)
    reader = READERS.get(str(kind))
    if reader is None:
        raise refuse(f"architecture {kind!r}", f"there is a counterpart for {listing(READERS)}")
    weights = weights_of(folder)
    drafts = reader(model, config, by_module(weights, own))
    return assemble(model, drafts, name=name, notes={"from": f"AdapterHub {kind}"})


def weights_of(folder: Path) -> Held:
    """The tensors of a directory."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / PICKLED).is_file():
            fix = f"torch.load(..., weights_only=True) it yourself, and save clones of its tensors as {WEIGHTS}"
            raise refuse(str(folder / PICKLED), "it is a pickle, which can run code when read", fix)
        raise UserError(f"AdapterHub: no {WEIGHTS} in {folder}")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"AdapterHub: {path} cannot be read: {error}") from None


def by_module(weights: Mapping[str, Tensor], name: str) -> dict[str, Held]:
    """Module path -> its tensors; the path ends before the adapter's name, the tensor's name begins behind it."""
    found: dict[str, Held] = {}
    strange = []
    for key, value in weights.items():
        path, middle, rest = key.partition(f".{name}.")
        if not middle:
            strange.append(key)
            continue
        found.setdefault(path, {})[rest] = value
    if strange:
        raise UserError(f"AdapterHub: tensors that belong to no adapter {name!r}: {listing(strange, 5)}")
    return found


def missing(model: nn.Module, problems: list[str]) -> None:
    """One error for everything that has no place."""
    if problems:
        told = "\n    ".join(problems)
        raise UserError(
            f"AdapterHub: the adapter does not fit this {plain_class(model)} ({len(problems)} problems):\n    {told}"
        )


# -------------------------------------------------------------------------------------------------------- bottlenecks


@dataclass(frozen=True)
class Shape:
    """One way a bottleneck can stand at a sub-layer: AdapterHub's switches, our method and its places."""

    method: str
    where: Mapping[str, str]
    """`attention` and `output` -> a role."""
    switches: Mapping[str, Any]


OFF = {"ln_before": False, "ln_after": False, "use_gating": False, "phm_layer": False, "inv_adapter": None}
OFF |= {"cross_adapter": False, "adapter_residual_before_ln": False, "original_ln_after": True}
SHAPES = (
    Shape("pfeiffer", {"output": "stream"}, {"original_ln_before": True, "is_parallel": False, "mh_adapter": False}),
    Shape("houlsby", {"attention": "attn", "output": "ffn"}, {"original_ln_before": False, "is_parallel": False}),
    Shape("parallel", {"output": "ffn"}, {"is_parallel": True, "mh_adapter": False}),
)
PARTS = {
    "adapter_down.0.weight": "D",
    "adapter_down.0.bias": "d",
    "adapter_up.weight": "U",
    "adapter_up.bias": "u",
}
SIDE = re.compile(r"^(?P<block>.*?)\.?(?P<side>attention\.output|output|attention_adapters|output_adapters)\.adapters$")


def read_bottleneck(model: nn.Module, config: Mapping[str, Any], held: Mapping[str, Held]) -> list[Draft]:
    """Bottlenecks behind or beside sub-layers."""
    odd = [f"{key}={config[key]}" for key, off in OFF.items() if config.get(key, off) != off]
    shape = next((one for one in SHAPES if all(config.get(key) == value for key, value in one.switches.items())), None)
    if odd or shape is None or not (config.get("residual_before_ln") or config.get("is_parallel")):
        raise refuse(f"a bottleneck with {listing(odd) or 'these switches'}", "this has no counterpart here")
    word = str(config.get("non_linearity", "relu")).lower()
    if word not in ACTIVATIONS or (shape.method == "parallel" and word != "relu"):
        raise refuse(f"a bottleneck with {word}", "its nonlinearity is not to be had here")
    scale = config.get("scaling", 1.0)
    if not isinstance(scale, int | float):
        raise refuse(f"a bottleneck with scaling={scale!r}", "the scale is a number here")
    places = {side: blocks(model, role) for side, role in shape.where.items()}
    drafts, problems = [], []
    for path, tensors in held.items():
        match = SIDE.match(path)
        side = None if match is None else "attention" if match["side"].startswith("attention") else "output"
        place = None if match is None or side not in places else places[str(side)].get(match["block"])
        names = {
            "adapter_down.0.weight": "D",
            "adapter_down.0.bias": "d",
            "adapter_up.weight": "U",
            "adapter_up.bias": "u",
        }
        if place is None or set(tensors) != set(names):
            problems.append(f"{path} ({', '.join(tensors)})")
            continue
        mine = {names[key]: value for key, value in tensors.items()}
        settings: dict[str, Any] = {"bottleneck": len(mine["d"])}
        if shape.method == "parallel":
            settings["scale"] = float(scale)
        else:
            settings["activation"] = ACTIVATIONS[word]
            mine |= {key: mine[key] * scale for key in ("U", "u") if scale != 1}
        if shape.method == "pfeiffer" and place.role == "stream":
            mine["behind_norm"] = torch.ones(())
        drafts.append(Draft(place, find(shape.method)(**settings), mine))
    missing(model, problems)
    return drafts


def blocks(model: nn.Module, role: str) -> dict[str, Place]:
    """Path of a block -> its place of a role."""
    found = {}
    try:
        whole = {place.layer: place.module for place in select(model, "block")}
        found = {whole[place.layer]: place for place in select(model, role)}
    except UserError as error:
        raise refuse(f"a bottleneck at {role}", error.message) from None
    return found


# ----------------------------------------------------------------------------------------------------- LoRA and IA3


def read_lora(model: nn.Module, config: Mapping[str, Any], held: Mapping[str, Held]) -> list[Draft]:
    """LoRA adds, IA3 is AdapterHub's LoRA that scales."""
    odd = [key for key in ("use_gating", "use_dora", "vera_d", "vera_b") if config.get(key)]
    if odd:
        raise refuse(f"LoRA with {listing(odd)}", "this has no counterpart here")
    known = places_by_path(model)
    scales = config.get("composition_mode") == "scale"
    drafts, problems = [], []
    for path, tensors in held.items():
        place = known.get(path.removesuffix(".loras"))
        weight: Any = None if place is None else model.get_submodule(place.module).weight
        A, B = tensors.get("lora_A"), tensors.get("lora_B")
        if place is None or B is None or (A is None and not scales):
            problems.append(f"{path} ({', '.join(tensors)})")
        elif scales:
            l = B.flatten()  # noqa: E741
            drafts.append(Draft(place, find("ia3")(inputs=""), {"l": l}))
        elif A is not None and {A.shape[1], B.shape[0]} == set(weight.shape):
            rank = A.shape[0]
            lora = find("lora")(rank=rank, alpha=float(config["alpha"]), dropout=float(config.get("dropout") or 0.0))
            drafts.append(Draft(place, lora, {"A": A, "B": B}))
        else:
            problems.append(f"{path}: its factors are those of parts of a fused weight")
    missing(model, problems)
    return drafts


# ------------------------------------------------------------------------------------------------------------ prefixes


def read_prefix(model: nn.Module, config: Mapping[str, Any], held: Mapping[str, Held]) -> list[Draft]:
    """One tensor of keys and values for all layers, which every layer's file repeats."""
    if config.get("use_gating"):
        raise refuse("a prefix with use_gating", "this has no counterpart here")
    first = next(iter(held.values()))
    other = sorted({name.split(".")[0] for tensors in held.values() for name in tensors} - {"self_prefix"})
    if other or not any(name.startswith("self_prefix.") for name in first):
        raise refuse(f"a prefix with {listing(other)}", "only prefixes of self-attention are read")
    t = {name.removeprefix("self_prefix."): value for name, value in first.items()}
    if "control_trans" in t:
        flat = t["control_trans"]
    else:
        h = torch.tanh(nn.functional.linear(t["wte.weight"], t["control_trans.0.weight"], t["control_trans.0.bias"]))
        flat = nn.functional.linear(h, t["control_trans.2.weight"], t["control_trans.2.bias"])
    length, pairs = int(config["prefix_length"]), layers_of(model, cached=False)
    cache = flat.reshape(length, 2 * len(pairs), -1)
    heads = heads_of_keys(model, cache.shape[-1])
    turn = rotation(model, length + 1)
    if turn is not None:  # text starts at position 0 there, at `length` here: keys are turned by what is between
        turn = (turn[0].flip(0)[:length], turn[1].flip(0)[:length])
    method = find("prefix_tuning")(length=length, hidden=None)
    drafts = []
    for index, (k, v) in enumerate(pairs):
        key = turned(cache[:, 2 * index].float(), heads, turn, back=False).to(cache.dtype)
        drafts += [Draft(k, method, {"P": key}), Draft(v, method, {"P": cache[:, 2 * index + 1]})]
    return drafts


def heads_of_keys(model: nn.Module, width: int) -> int:
    """Heads of keys and values, by the model's configuration."""
    text: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if width % heads:
        raise refuse(f"a prefix {width} wide", f"it is not cut into {heads} heads")
    return int(heads)


# ---------------------------------------------------------------------------------------------------------------- ReFT


def read_reft(model: nn.Module, config: Mapping[str, Any], held: Mapping[str, Held]) -> list[Draft]:
    """LoReFT where rows are orthonormal, else NoReFT: the file does not say whether a projection was subtracted."""
    if config.get("non_linearity") not in (None, "linear"):
        raise refuse(f"ReFT with {config['non_linearity']}", "the edit is linear here")
    first, last = int(config["prefix_positions"]), int(config["suffix_positions"])
    apart = not config.get("tied_weights") and first and last
    places = blocks(model, "block")
    drafts, problems = [], []
    for path, tensors in held.items():
        place = places.get(path.removesuffix(".reft_layer.refts"))
        if place is None:
            problems.append(f"{path} ({', '.join(tensors)})")
            continue
        units = [unit_of(tensors, number, bool(config["orthogonality"])) for number in (0, 1)]
        if any(unit is not None and "M" in unit and not rows_orthonormal(unit["M"]) for unit in units):
            units = [None if unit is None else {"W1": unit["W"], "W2": unit["M"], "b": unit["b"]} for unit in units]
        kind = "loreft" if any(unit is not None and "M" in unit for unit in units) else "noreft"
        inner = find(kind)(rank=int(config["r"]), first=first, last=last)
        method = find("untied")(inner=inner) if apart else inner
        if apart and units[1] is not None and units[0] is not None:
            named = {"first": units[0], "last": units[1]}
            mine = {f"{end}.{key}": value for end, unit in named.items() for key, value in unit.items()}
        else:
            chosen = units[0] if config.get("tied_weights") or first else units[1]
            mine = dict(chosen or {})
        drafts.append(Draft(place, method, mine))
    missing(model, problems)
    return drafts


def rows_orthonormal(R: Tensor) -> bool:
    """Whether the library's parametrization gave what it is for; else the edit is that of free rows."""
    return bool((R @ R.mT - torch.eye(len(R))).abs().max() < 1e-4)


def unit_of(tensors: Held, number: int, orthogonal: bool) -> Held | None:
    """One intervention by our names."""
    start = f"units.{number}."
    t = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
    if not t:
        return None
    source = {"b": t["learned_source.bias"]}
    if not orthogonal:
        return source | {"W1": t["learned_source.weight"], "W2": t["projection.weight"]}
    rows, width = t["projection.parametrizations.weight.original"].shape
    layer: Any = nn.utils.parametrizations.orthogonal(nn.Linear(width, rows, bias=False))
    layer.load_state_dict({name.removeprefix("projection."): one for name, one in t.items() if "projection." in name})
    return source | {"W": t["learned_source.weight"], "M": layer.weight.detach().clone()}


READERS: Mapping[str, Callable[[nn.Module, Mapping[str, Any], Mapping[str, Held]], list[Draft]]] = {
    "bottleneck": read_bottleneck,
    "lora": read_lora,
    "prefix_tuning": read_prefix,
    "reft": read_reft,
}
"""AdapterHub's architecture -> its reader."""
