"""LoRA, LoHa and LoKr files of kohya's scripts and of LyCORIS: one safetensors file with flattened module names, read.

A key is `lora_unet_down_blocks_0_attn_to_q.lora_down.weight`: a prefix, the module's path with `_` for every dot, and
the tensor. `alpha` stands beside each, the scale is alpha / rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trimtab.core.draw import site_at
from trimtab.core.errors import UserError, nearest
from trimtab.core.places import Place
from trimtab.core.registry import find
from trimtab.core.save import plain_class
from trimtab.core.state import State
from trimtab.interop.saved import Draft, Saved, assemble, places_by_path

PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_", "lycoris_", "")
SIGNS = (".lora_down.weight", ".hada_w1_a", ".lokr_w1", ".lokr_w1_a")
Held = dict[str, Tensor]


def is_kohya(path: str | Path) -> bool:
    """Whether a file is one of kohya's scripts or of LyCORIS, by its keys."""
    from trimtab.interop.shards import header_of

    one = Path(path)
    if not one.is_file() or one.suffix != ".safetensors":
        return False
    try:
        return any(key.endswith(SIGNS) for key in header_of(one)[0])
    except (OSError, ValueError):
        return False


def from_kohya(model: nn.Module, path: str | Path, name: str = "default") -> Saved:
    """Such a file as an adapter of ours, for this model. Errors: every tensor that has no place, at once."""
    from safetensors.torch import load_file

    held: dict[str, Held] = {}
    for key, value in load_file(path).items():
        stem, _, rest = key.partition(".")
        held.setdefault(stem, {})[rest] = value
    flat: dict[str, Place] = {}
    for place in places_by_path(model).values():
        if place.parameter is None:
            flat[place.module.replace(".", "_")] = place
    drafts, problems = [], []
    for stem, tensors in held.items():
        found = next((flat[end] for end in ends_of(stem) if end in flat), None)
        if found is None:
            close = nearest(stem, flat, 1)
            problems.append(f"no module for {stem}" + (f" (nearest: {close[0]})" if close else ""))
            continue
        read = next((one for sign, one in READERS.items() if sign in tensors), None)
        if read is None:
            problems.append(f"{stem} has {', '.join(tensors)}: no LoRA, LoHa or LoKr")
            continue
        drafts.append(read(model, found, tensors))
    if problems:
        told = "\n    ".join(problems)
        raise UserError(f"kohya: {path} does not fit this {plain_class(model)} ({len(problems)} problems):\n    {told}")
    return assemble(model, drafts, name=name, notes={"from": "kohya"})


def ends_of(stem: str) -> list[str]:
    """What a stem may mean without its prefix."""
    return [stem.removeprefix(prefix) for prefix in PREFIXES if stem.startswith(prefix)]


def refuse_extra(place: Place, tensors: Mapping[str, Tensor], known: set[str]) -> None:
    """Refuse tensors that mean another computation (Tucker cores, DoRA along the input)."""
    more = sorted(set(tensors) - known - {"alpha"})
    if more:
        raise UserError(f"kohya: {place.name} has {', '.join(more)}, which have no counterpart here")


def alpha_of(tensors: Mapping[str, Tensor], rank: int) -> float:
    """alpha, or the rank where none is told: a scale of 1."""
    return float(tensors["alpha"]) if "alpha" in tensors else float(rank)


def read_lora(model: nn.Module, place: Place, tensors: Held) -> Draft:
    refuse_extra(place, tensors, {"lora_down.weight", "lora_up.weight", "dora_scale"})
    A, B = tensors["lora_down.weight"].flatten(1), tensors["lora_up.weight"].flatten(1)
    lora: Any = find("lora")(rank=A.shape[0], alpha=alpha_of(tensors, A.shape[0]))
    if "dora_scale" not in tensors:
        return Draft(place, lora, {"A": A, "B": B})
    m = tensors["dora_scale"]
    out = site_at(model, State(), place).base.shape[0]
    if m.shape[0] != out or m.numel() != out:
        raise UserError(f"kohya: the magnitudes of {place.name} go along its input; here they go along its output")
    return Draft(place, find("magnitude")(inner=lora), {"m": m.flatten(), "inner.A": A, "inner.B": B})


def read_loha(model: nn.Module, place: Place, tensors: Held) -> Draft:
    names = {"hada_w1_a": "B1", "hada_w1_b": "A1", "hada_w2_a": "B2", "hada_w2_b": "A2"}
    refuse_extra(place, tensors, set(names))
    rank = tensors["hada_w1_b"].shape[0]
    method = find("loha")(rank=rank, alpha=alpha_of(tensors, rank))
    return Draft(place, method, {ours: tensors[theirs] for theirs, ours in names.items()})


def read_lokr(model: nn.Module, place: Place, tensors: Held) -> Draft:
    """With two full factors the scale is 1 whatever alpha says; a factored first one is multiplied out."""
    refuse_extra(place, tensors, {f"lokr_w{n}{side}" for n in (1, 2) for side in ("", "_a", "_b")})
    factored = [tensors[name] for name in ("lokr_w1_b", "lokr_w2_b") if name in tensors]
    rank = factored[0].shape[0] if factored else None
    scale = 1.0 if rank is None else alpha_of(tensors, rank) / rank
    C = tensors["lokr_w1"] if "lokr_w1" in tensors else tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    factor = max(C.shape)
    found: Held = {"C": C}
    if "lokr_w2" in tensors:
        D = tensors["lokr_w2"]
        k, n = D.shape
        found["D"] = D * scale
        return Draft(place, find("lokr")(rank=max(1, -(-max(k, n) // 2)), factor=factor), found)
    assert rank is not None
    A, B = tensors["lokr_w2_b"], tensors["lokr_w2_a"]
    if 2 * A.shape[0] >= max(A.shape[1], B.shape[0]):  # full here
        found["D"] = scale * (B @ A)
    else:
        found |= {"A": A, "B": B}
    return Draft(place, find("lokr")(rank=A.shape[0], alpha=scale * A.shape[0], factor=factor), found)


READERS: Mapping[str, Callable[[nn.Module, Place, Held], Draft]] = {
    "lora_down.weight": read_lora,
    "hada_w1_a": read_loha,
    "lokr_w1": read_lokr,
    "lokr_w1_a": read_lokr,
}
"""A tensor by which a kind is known -> its reader."""
