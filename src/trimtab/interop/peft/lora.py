"""LoRA and DoRA in PEFT's format: pairs at linears, embeddings, convolutions and stacks of experts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import listing
from trimtab.core.registry import find
from trimtab.core.rows import Rows
from trimtab.interop.peft.row import Layer, Tensors, refuse
from trimtab.interop.saved import Draft, SavedPart, SavedSite

UNKNOWN = {
    "use_qalora": False,
    "use_bdlora": None,
    "kasa_config": None,
    "monteclora_config": None,
    "arrow_config": None,
    "alora_invocation_tokens": None,
    "layer_replication": None,
}
"""Options that change what is computed and have no counterpart here, with the value that switches them off."""
PLAIN_STARTS = (True, False, None, "true", "false", "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that leave the frozen weights as they are."""
PAIR = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_embedding_A": "A", "lora_embedding_B": "B"}
NAMES = frozenset({*PAIR, "lora_B.bias", "lora_magnitude_vector", "lora_magnitude_vector.weight"})


def setting(config: Mapping[str, Any], path: str, key: str, pattern: str) -> Any:
    """A setting of PEFT's config at one module: the first pattern that ends its path, else the general value."""
    for text, value in (config.get(pattern) or {}).items():
        if re.fullmatch(rf"(.*\.)?({text})", path):
            return value
    return config.get(key)


def check_options(config: Mapping[str, Any]) -> None:
    """Refuse a LoRA whose options mean another computation."""
    odd = [key for key, off in UNKNOWN.items() if config.get(key) not in (off, None)]
    if odd:
        raise refuse(f"LORA with {listing(odd)}", "this changes what is computed and has no counterpart here")
    start = config.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise refuse(
            f"LORA with init_lora_weights={start!r}",
            "PEFT takes its start out of the base weights, so the file alone does not say what was computed",
            "save it with path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
        )


def read_lora(layers: Sequence[Layer], config: Mapping[str, Any]) -> list[Draft]:
    """The drafts of all LoRA layers, one part if possible: odd ranks and alphas by name."""
    check_options(config)
    power = 0.5 if config.get("use_rslora") else 1.0
    dora = any(name.startswith("lora_magnitude_vector") for layer in layers for name in layer.tensors)
    pairs = [pair_of(layer) for layer in layers]
    ranks = [A.shape[-2] for A, _ in pairs]
    alphas = [float(setting(config, layer.place.module, "lora_alpha", "alpha_pattern") or 8) for layer in layers]
    rank, odd_ranks = usual(layers, ranks)
    alpha, odd_alphas = usual(layers, alphas)
    rate = float(config.get("lora_dropout") or 0.0)
    lora: Any = find("lora")(
        rank=int(rank), alpha=alpha, dropout=rate, rank_power=power, ranks=odd_ranks, alphas=odd_alphas
    )
    method = find("magnitude")(inner=lora) if dora else lora
    drafts = []
    for layer, (A, B), one in zip(layers, pairs, alphas, strict=True):
        tensors = {"A": A, "B": B}
        if odd_alphas:
            experts = A.shape[:1] if A.ndim == 3 else ()
            tensors["alpha"] = torch.full(experts, one)
        if dora:
            tensors = {f"inner.{key}": value for key, value in tensors.items()}
            m = next(layer.tensors[name] for name in sorted(NAMES) if "magnitude" in name and name in layer.tensors)
            tensors["m"] = m.flatten()
        drafts.append(Draft(layer.place, method, tensors))
        if "lora_B.bias" in layer.tensors:
            scale = one / A.shape[-2] ** power
            drafts.append(Draft(layer.place, find("output_bias")(), {"d": layer.tensors["lora_B.bias"] * scale}))
    return drafts


def usual(layers: Sequence[Layer], values: Sequence[float]) -> tuple[float, str]:
    """The most frequent value, and the others in the language of patterns by site."""
    most = max(dict.fromkeys(values), key=values.count)
    odd = [f"{layer.place.name}={value:g}" for layer, value in zip(layers, values, strict=True) if value != most]
    return most, ", ".join(odd)


def pair_of(layer: Layer) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) of a layer; for experts (experts, rank, in) and (experts, out, rank)."""
    refuse_attention(layer.place.module, layer.module)
    found = {PAIR[name]: value for name, value in layer.tensors.items() if name in PAIR}
    A, B = found["A"], found["B"]
    if layer.place.kind == "conv":
        if getattr(layer.module, "groups", 1) > 1:
            raise refuse(f"LORA at {layer.place.name}", "over a grouped convolution its A mixes the groups")
        return A.flatten(1), B.flatten(1)
    if layer.place.parameter is not None and A.shape[0] != B.shape[1]:
        raise refuse(f"LORA at {layer.place.name}", f"A {tuple(A.shape)} and B {tuple(B.shape)} do not meet")
    raw = getattr(layer.module, layer.place.parameter or "weight", None)
    if layer.place.parameter is not None and raw is not None and raw.ndim == 3:
        experts = raw.shape[0]
        return A.unflatten(0, (experts, -1)), B.unflatten(1, (-1, experts)).permute(2, 0, 1)
    return A, B


# ---------------------------------------------------------------------------------------------------------- writing


@dataclass
class Pair:
    """What one module gets in PEFT's file."""

    site: SavedSite
    A: Tensor
    B: Tensor
    alpha: float
    m: Tensor | None = None
    bias: Tensor | None = None


def is_lora(method: Any) -> bool:
    """Whether a method is LoRA, or DoRA: a magnitude over LoRA."""
    lora, magnitude = find("lora"), find("magnitude")
    return isinstance(method, lora) or (
        isinstance(method, magnitude) and isinstance(getattr(method, "inner", None), lora)
    )


def pairs_of(part: SavedPart, power: float) -> list[Pair]:
    """The pairs of a part at its sites, with the alpha that PEFT's scale makes the same s of."""
    dora = hasattr(part.method, "inner")
    method: Any = part.method.inner if dora else part.method
    if part.encoded:
        raise refuse(
            f"{type(method).__name__} started on quantized weights",
            "it fits the codes of these weights only, which PEFT does not keep",
        )
    found = []
    for site in part.sites:
        held = {key.removeprefix("inner."): value for key, value in site.tensors.items()}
        A, B = held["A"], held["B"]
        used = float(held["alpha"].flatten()[0]) if "alpha" in held else method.alpha
        s = used / (method.rank if method.elastic else A.shape[-2]) ** method.rank_power
        if method.takes_out:
            A, B = torch.cat([A, held["A0"]], -2), torch.cat([B, -held["B0"]], -1)
        same = power == method.rank_power and not method.takes_out and not method.elastic
        alpha = used if same else s * A.shape[-2] ** power
        found.append(Pair(site, A, B, alpha, held["m"] if dora else None))
    return found


def joined(pairs: Sequence[Pair], out: int, power: float) -> Pair:
    """One pair for a fused weight out of pairs of its parts: A stacked, B in blocks, every scale brought to one."""
    first = pairs[0]
    if any(pair.m is not None for pair in pairs):
        raise refuse(
            f"DoRA at {first.site.place.name}", "PEFT has one magnitude for all rows of a fused weight", "where='qkv'"
        )
    scales = [pair.alpha / pair.A.shape[-2] ** power for pair in pairs]
    B = first.B.new_zeros(out, sum(pair.A.shape[0] for pair in pairs))
    start = 0
    for pair, scale in zip(pairs, scales, strict=True):
        rows, stop = pair.site.place.rows or Rows(0, out), start + pair.A.shape[0]
        B[:, start:stop] = rows.among(pair.B * (scale / scales[0]), out, 0)
        start = stop
    A = torch.cat([pair.A for pair in pairs])
    return Pair(first.site, A, B, scales[0] * A.shape[0] ** power)


def write_lora(
    parts: Sequence[SavedPart], biases: Mapping[str, Tensor], modules: Mapping[str, Any], sizes: Mapping[str, int]
) -> tuple[dict[str, Any], dict[str, Tensors]]:
    """PEFT's config and its tensors by path, for LoRA parts with the output biases at the same sites."""
    loras = [part.method.inner if hasattr(part.method, "inner") else part.method for part in parts]
    power = 0.5 if all(lora.rank_power == 0.5 for lora in loras) else 1.0
    dora = [hasattr(part.method, "inner") for part in parts]
    if any(dora) and not all(dora):
        raise refuse("LoRA beside DoRA", "one PEFT adapter has a magnitude everywhere or nowhere")
    by_path: dict[str, list[Pair]] = {}
    for part in parts:
        for pair in pairs_of(part, power):
            place = pair.site.place
            by_path.setdefault(place.whole, []).append(pair)
    whole = {path: pairs[0] for path, pairs in by_path.items() if len(pairs) == 1 and pairs[0].site.place.rows is None}
    for path, pairs in by_path.items():
        if path not in whole:
            whole[path] = stacked(pairs, sizes[path], power)
    order = [path for path in by_path if path in whole]
    ranks = {path: whole[path].A.shape[-2] for path in order}
    alphas = {path: whole[path].alpha for path in order}
    rank = max(dict.fromkeys(ranks.values()), key=list(ranks.values()).count)
    alpha = max(dict.fromkeys(alphas.values()), key=list(alphas.values()).count)
    tensors: dict[str, Tensors] = {}
    targets: dict[str, list[str]] = {}
    for path in order:
        place = whole[path].site.place
        if place.parameter is None:
            tensors[path] = at_module(whole[path], modules[path])
        else:
            targets.setdefault(place.module, []).append(place.parameter)
    for module, names in targets.items():
        refuse_attention(module, modules[f"{module}.{names[0]}"])
        tensors |= at_parameters(module, names, whole)
    if biases:
        for path in order:
            scale = whole[path].alpha / ranks[path] ** power
            d = biases.get(path)
            tensors[path]["lora_B.bias"] = torch.zeros(len(whole[path].B)) if d is None else d / scale
    raw = [f"{module}.{name}" for module, names in targets.items() for name in names]
    module_of = {path: whole[path].site.place.module if path in raw else path for path in order}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": plain(alpha),
        "lora_dropout": 0.0 if raw else max(lora.dropout for lora in loras),
        "use_rslora": power == 0.5,
        "use_dora": all(dora),
        "lora_bias": bool(biases),
        "bias": "none",
        "init_lora_weights": True,
        "rank_pattern": {module_of[path]: value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {module_of[path]: plain(value) for path, value in alphas.items() if value != alpha},
        "target_modules": [path for path in order if path not in raw],
    }
    if raw:
        config["target_parameters"] = raw
    if any(hasattr(module, "nf") for path, module in modules.items() if path in order):
        config["fan_in_fan_out"] = True
    return config, tensors


def stacked(pairs: Sequence[Pair], out: int, power: float) -> Pair:
    """`joined`, also for the parts of experts' stacked matrices."""
    if pairs[0].A.ndim == 2:
        return joined(pairs, out, power)
    each = [
        joined([Pair(pair.site, pair.A[e], pair.B[e], pair.alpha) for pair in pairs], out, power)
        for e in range(pairs[0].A.shape[0])
    ]
    return Pair(
        pairs[0].site, torch.stack([one.A for one in each]), torch.stack([one.B for one in each]), each[0].alpha
    )


def plain(value: float) -> float:
    """A whole number where it is one, as PEFT writes alphas."""
    return int(value) if float(value).is_integer() else value


def at_module(pair: Pair, module: Any) -> Tensors:
    """A pair by PEFT's names, in the shapes of its kind of layer."""
    kind = pair.site.place.kind
    if kind == "embedding":
        tensors = {"lora_embedding_A": pair.A, "lora_embedding_B": pair.B}
    elif kind == "conv":
        if module.groups > 1:
            raise refuse(f"LoRA at {pair.site.place.name}", "over a grouped convolution PEFT's A mixes the groups")
        kernel = module.weight.shape[1:]
        B = pair.B.reshape(*pair.B.shape, *[1] * (len(kernel) - 1))
        tensors = {"lora_A.weight": pair.A.unflatten(1, kernel), "lora_B.weight": B}
    else:
        tensors = {"lora_A.weight": pair.A, "lora_B.weight": pair.B}
    if pair.m is not None:
        shape = (1, -1, *[1] * (module.weight.ndim - 2)) if kind == "conv" else (-1,)
        tensors["lora_magnitude_vector"] = pair.m.reshape(shape)
    return tensors


def refuse_attention(path: str, module: Any) -> None:
    """PEFT 0.21 adds the change of torch's own attention's output projection twice, so file and computation differ."""
    if isinstance(module, nn.MultiheadAttention):
        raise refuse(f"LoRA at {path}", "PEFT adds the change of its output projection twice, so the file says another")


def at_parameters(module: str, names: Sequence[str], whole: Mapping[str, Pair]) -> dict[str, Tensors]:
    """The pairs at raw parameters of one module: PEFT nests its wrappers, the last parameter outermost."""
    found: dict[str, Tensors] = {}
    for depth, name in enumerate(reversed(names)):
        pair = whole[f"{module}.{name}"]
        A, B = pair.A, pair.B
        if A.ndim == 3:
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
        found[module + ".base_layer" * depth] = {"lora_A.weight": A, "lora_B.weight": B}
    return found
