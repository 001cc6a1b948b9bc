"""Plain copies in PEFT's files: whole modules, biases, norms and the rows of a few tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.draw import site_at
from trimtab.core.places import Place
from trimtab.core.registry import find
from trimtab.core.state import State
from trimtab.interop.peft.row import Tensors, refuse
from trimtab.interop.saved import Draft, SavedPart, places_by_path

COPIED = ("weight", "bias")


def frozen(model: nn.Module, place: Place) -> Any:
    """The base of a place; its weight has to be there."""
    base = site_at(model, State(), place).base
    if base.weight.is_meta:
        raise ValueError(f"{place.name} is only an outline: this conversion reads the weights of the base model")
    return base


def turned(module: nn.Module, place: Place, W: Tensor) -> Tensor:
    """A weight from its stored to its canonical (out, in) form, or back."""
    if place.kind == "embedding" or hasattr(module, "nf"):
        return W.mT
    if place.kind == "norm":
        return W[:, None] if W.ndim == 1 else W[:, 0]
    return W


def read_copy(model: nn.Module, place: Place, tensors: Mapping[str, Tensor]) -> list[Draft]:
    """A module of `modules_to_save`, or a bias of `bias="all"`, which is all that was saved of its module."""
    module = model.get_submodule(place.module)
    if "weight" not in tensors:
        b = frozen(model, place).bias
        if b is None:
            raise refuse(f"{place.name}.bias", f"{type(module).__name__} has no bias here")
        return [Draft(place, find("bit_fit")(), {"d": tensors["bias"] - b.detach().cpu().to(tensors["bias"].dtype)})]
    W = tensors["weight"]
    V = W.flatten(1) if place.kind == "conv" else turned(module, place, W)
    found = {"V": V}
    b = site_at(model, State(), place).base.bias
    if b is not None:
        found["c"] = tensors["bias"] if "bias" in tensors else b.detach().cpu().to(V.dtype)
    return [Draft(place, find("full")(), found)]


def read_base_layer(model: nn.Module, place: Place, tensors: Mapping[str, Tensor]) -> list[Draft]:
    """What PEFT saves of the frozen layer under an adapter: nothing new, or another weight, or a trained bias."""
    drafts = []
    if "base_layer.weight" in tensors:
        W = tensors["base_layer.weight"]
        stored = model.get_submodule(place.module)._parameters.get("weight")
        same = stored is not None and W.shape == stored.shape and torch.equal(W, stored.detach().cpu().to(W.dtype))
        if not same:
            drafts += read_copy(model, place, {"weight": W})
    if "base_layer.bias" in tensors:
        drafts += read_copy(model, place, {"bias": tensors["base_layer.bias"]})
    return drafts


def read_rows(model: nn.Module, place: Place, rows: Tensor, config: Mapping[str, Any]) -> list[Draft]:
    """Trained tokens: their vectors, at the module and at whatever shares its weight in a model that ties them."""
    given = config.get("token_indices") or config.get("trainable_token_indices") or []
    if isinstance(given, Mapping):
        given = next((ids for name, ids in given.items() if f".{place.module}".endswith(f".{name}")), [])
    if len(given) != len(rows):
        raise refuse(f"trained tokens of {place.name}", f"{len(given)} ids and {len(rows)} vectors")
    order = sorted(range(len(given)), key=lambda at: given[at])
    index, V = torch.tensor([int(given[at]) for at in order]), rows[order]
    return [rows_at(model, one, index, V) for one in [place, *tied(model, place)]]


def tied(model: nn.Module, place: Place) -> list[Place]:
    """The other places that share the weight of the input embedding, in a model that says it ties them."""
    embedding, ask = model.get_submodule(place.module), getattr(model, "get_input_embeddings", None)
    says = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    if not says or ask is None or ask() is not embedding:
        return []
    weight = embedding._parameters.get("weight")
    shared = {path for path, module in model.named_modules() if module._parameters.get("weight") is weight}
    known = places_by_path(model)
    return [known[path] for path in sorted(shared - {place.module}) if path in known]


def rows_at(model: nn.Module, place: Place, index: Tensor, V: Tensor) -> Draft:
    """The rows of an embedding; at an output head W + B A with one-hot columns B and A the change of each row."""
    if place.kind == "embedding":
        method = find("embedding_rows")(tokens=", ".join(str(int(one)) for one in index))
        return Draft(place, method, {"index": index, "V": V})
    E, n = frozen(model, place).weight.detach().cpu(), len(index)
    B = V.new_zeros(E.shape[0], n)
    B[index, torch.arange(n)] = 1
    return Draft(place, find("lora")(rank=n, alpha=float(n)), {"A": V - E[index].to(V.dtype), "B": B})


def write_rows(
    model: nn.Module, part: SavedPart, heads: Sequence[SavedPart]
) -> tuple[dict[str, Any], dict[str, Tensors]]:
    """Trained tokens by PEFT's names; `heads` are the parts that do the same to a tied head."""
    tensors: dict[str, Tensors] = {}
    indices: dict[str, list[int]] = {}
    held = {site.place.module: site.tensors for site in part.sites}
    repeated: set[str] = set()
    for site in sorted(part.sites, key=lambda site: not tied(model, site.place)):
        if site.place.module in repeated:
            continue
        for other in tied(model, site.place):
            same = held.get(other.module)
            twin = same is not None and all(torch.equal(same[key], site.tensors[key]) for key in ("index", "V"))
            if not twin and not any(covers(model, site.place, site.tensors, one) for one in heads):
                raise refuse(
                    f"EmbeddingRows at {site.place.name}",
                    f"PEFT trains the same rows of {other.name}, which shares them",
                )
            repeated.add(other.module)
        tensors[site.place.module] = {"trainable_tokens_delta": site.tensors["V"]}
        indices[site.place.module] = [int(one) for one in site.tensors["index"]]
    return {"trainable_token_indices": indices}, tensors


def covers(model: nn.Module, place: Place, held: Mapping[str, Tensor], part: SavedPart) -> bool:
    """Whether a LoRA part is what `rows_at` makes of these rows at a tied head."""
    heads = [one for one in tied(model, place) if one.kind == "linear"]
    if len(part.sites) != 1 or part.sites[0].place.module not in [one.module for one in heads]:
        return False
    wanted = rows_at(model, part.sites[0].place, held["index"], held["V"])
    found = part.sites[0].tensors
    return part.method == wanted.method and all(torch.equal(found[key], wanted.tensors[key]) for key in ("A", "B"))


def write_copies(model: nn.Module, part: SavedPart) -> dict[str, Tensors]:
    """Whole modules by path, in the shapes they are stored in."""
    found: dict[str, Tensors] = {}
    for site in part.sites:
        place = site.place
        if place.parameter is not None or place.rows is not None:
            raise refuse(f"Full at {place.name}", "PEFT saves whole modules", "train the whole module")
        module: Any = model.get_submodule(place.module)
        V = site.tensors["V"]
        W = V.reshape(module._parameters["weight"].shape) if place.kind == "conv" else turned(module, place, V)
        found[place.module] = {"weight": W} | ({"bias": site.tensors["c"]} if "c" in site.tensors else {})
    return found


def write_norms(model: nn.Module, part: SavedPart) -> dict[str, Tensors]:
    """LN-tuning by path: the trained norms themselves, not their offsets."""
    found: dict[str, Tensors] = {}
    for site in part.sites:
        base = frozen(model, site.place)
        g = site.tensors["g"]
        found[site.place.module] = {"weight": (base.weight.to(g.dtype) + g)[:, 0]}
        if "d" in site.tensors:
            found[site.place.module]["bias"] = base.bias.to(g.dtype) + site.tensors["d"]
    return found


def write_biases(model: nn.Module, part: SavedPart) -> dict[str, Tensor]:
    """BitFit's biases by path: themselves, not their offsets."""
    found = {}
    for site in part.sites:
        if site.place.parameter is not None or site.place.rows is not None:
            raise refuse(f"BitFit at {site.place.name}", "PEFT saves the bias of a whole module")
        d = site.tensors["d"]
        found[site.place.module] = frozen(model, site.place).bias.to(d.dtype) + d
    return found
