"""Where PEFT and we write the same method with other tensors or settings: a pair of small functions for each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from trimtab.core.low_rank import key_of
from trimtab.interop.peft.row import GROUP, Layer, Reading, Settings, Tensors, Writing, refuse, site_of
from trimtab.interop.saved import SavedPart, SavedSite


def read_adalora(layer: Layer, reading: Reading) -> Reading:
    """PEFT leaves pruned ranks out of its file and still divides by the first rank; here they stay, with λ = 0."""
    settings, tensors, _ = reading
    rank, kept = int(layer.config["init_r"]), tensors["P"].shape[1]
    alpha = float(layer.config.get("lora_alpha") or rank)
    wide = {"P": (0, rank - kept), "Q": (0, 0, 0, rank - kept), "lambda_": (0, rank - kept)}
    tensors["lambda_"] = tensors["lambda_"].flatten()
    tensors = {key: nn.functional.pad(value, wide[key]) for key, value in tensors.items()}
    zeros = {key: torch.zeros_like(value) for key, value in tensors.items()}
    for kind in ("importance", "uncertainty"):
        tensors |= {f"{kind}.{key}": value.clone() for key, value in zeros.items()}
    total, begin, last = (int(layer.config.get(key) or 0) for key in ("total_step", "tinit", "tfinal"))
    settings |= {"rank": rank, "alpha": alpha, "target": min(rank, int(layer.config.get("target_r", rank)))}
    settings |= {"begin": begin, "end": max(begin, total - last)}
    return settings, tensors | {"key": torch.tensor(key_of(site_of(layer)))}, {}


def share_adalora(layers: Sequence[Layer], shared: Tensors) -> Tensors:
    """Scores of importance are not in PEFT's file: they start anew."""
    rank = int(layers[0].config["init_r"])
    keys = torch.tensor([key_of(site_of(layer)) for layer in layers])
    return {"key": keys, "scores": torch.zeros(2, len(layers), rank)}


def write_adalora(part: SavedPart, site: SavedSite, writing: Writing) -> Writing:
    settings, tensors = writing
    method = part.method
    tensors["lora_E"] = tensors["lora_E"][:, None]
    schedule = {"tinit": method.begin, "tfinal": 0, "total_step": max(method.end, method.begin + 1)}
    return settings | schedule | {"r": method.rank, "rank_pattern": None}, tensors


def read_vera(layer: Layer, reading: Reading) -> Reading:
    settings, tensors, shared = reading
    if not shared:
        raise refuse(
            "VERA with save_projection=false",
            "the file has no vera_A and vera_B, which PEFT draws again from projection_prng_key",
            "load it once with PEFT, set save_projection=true and save it again",
        )
    return settings | {"rank": shared["A"].shape[0]}, tensors, shared


def share_vera(layers: Sequence[Layer], shared: Tensors) -> Tensors:
    out, into = (max(layer.shape[side] for layer in layers) for side in (0, 1))
    return {"A": shared["A"][:, :into], "B": shared["B"][:out]}


def read_randlora(layer: Layer, reading: Reading) -> Reading:
    """λ is transposed; sites with another number of bases need another order of B's columns, a part of their own."""
    settings, tensors, shared = reading
    if not shared:
        raise refuse(
            "RANDLORA with save_projection=false",
            "the file has no randlora_A and randlora_B",
            "load it once with PEFT, set save_projection=true and save it again",
        )
    rank, short = shared["A"].shape[0], min(layer.shape)
    n = -(-short // rank)
    tensors["lambda_"] = tensors["lambda_"].mT
    return settings | {"rank": rank, GROUP: n}, tensors, shared


def share_randlora(layers: Sequence[Layer], shared: Tensors) -> Tensors:
    """PEFT numbers the columns of B base by base and the rows of A row by row: B's columns are put in our order."""
    short, long = max(min(layer.shape) for layer in layers), max(max(layer.shape) for layer in layers)
    rank = shared["A"].shape[0]
    n = -(-short // rank)
    B = shared["B"][:long, :n].flatten(1).unflatten(1, (rank, n)).permute(2, 0, 1)
    return {"A": shared["A"][:, 0, :short], "B": B}


def unshare_randlora(part: SavedPart) -> Tensors:
    rank, n = part.method.rank, len(part.shared["B"])
    if any(-(-min(site.shape) // rank) != n for site in part.sites):
        raise refuse("RandLoRA on sites of several sizes", "PEFT pairs the bases of each size in another order")
    B = part.shared["B"].permute(1, 2, 0).flatten(1).unflatten(1, (n, rank))
    out, into = (max(site.shape[side] for site in part.sites) for side in (0, 1))
    short = min(out, into)  # PEFT's size of A: zeros behind what any site uses
    A = nn.functional.pad(part.shared["A"][:, None], (0, short - part.shared["A"].shape[1]))
    return {"randlora_A": A, "randlora_B": nn.functional.pad(B, (0, 0, 0, -(-short // rank) - n))}


def write_randlora(part: SavedPart, site: SavedSite, writing: Writing) -> Writing:
    settings, tensors = writing
    tensors["randlora_lambda"] = tensors["randlora_lambda"].mT
    return settings, tensors


def read_vblora(layer: Layer, reading: Reading) -> Reading:
    """A file of the k weights only becomes logits again: their logarithms, and −∞ for vectors that were not chosen."""
    settings, tensors, shared = reading
    vectors, length = shared["bank"].shape
    for ours, theirs in (("a", "vblora_logits_A"), ("b", "vblora_logits_B")):
        if ours not in tensors:
            index = layer.tensors[f"{theirs}_topk_indices"].long()
            weights = layer.tensors[f"{theirs}_topk_weights"]
            weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
            tensors[ours] = torch.full((*index.shape[:-1], vectors), -math.inf).scatter(-1, index, weights.log())
    return settings | {"rank": tensors["a"].shape[0], "vectors": vectors, "length": length}, tensors, shared


def write_vblora(part: SavedPart, site: SavedSite, writing: Writing) -> Writing:
    if any(size % part.method.length for size in site.shape):
        raise refuse(f"VBLoRA at {site.place.name}", f"PEFT wants sides that {part.method.length} divides")
    return writing


def read_fourier(layer: Layer, reading: Reading) -> Reading:
    settings, tensors, _ = reading
    out, into = layer.shape
    seed = int(layer.config.get("random_loc_seed") or 0)
    count = len(tensors["c"])
    places = torch.randperm(out * into, generator=torch.Generator().manual_seed(seed))[:count]
    return settings | {"coefficients": count, "entry_seed": seed}, tensors, {f"places_{out}_{into}": places}


def write_fourier(part: SavedPart, site: SavedSite, writing: Writing) -> Writing:
    out, into = site.shape
    seed = part.method.entry_seed
    known = part.shared[f"places_{out}_{into}"]
    if not torch.equal(torch.randperm(out * into, generator=torch.Generator().manual_seed(seed))[: len(known)], known):
        raise refuse("FourierFT", "PEFT draws the places from a seed, and these were drawn otherwise")
    return writing


def read_ia3(layer: Layer, reading: Reading) -> Reading:
    """A column scales the output, a row the input."""
    l = layer.tensors["ia3_l"]  # noqa: E741
    scales_input = l.shape[0] == 1 and l.shape[1] == layer.shape[1]
    return {"inputs": scales_input}, {"l_in" if scales_input else "l": l.flatten()}, {}


def gather_ia3(layers: Sequence[Layer], found: list[Settings]) -> list[Settings]:
    """Which sites scale their input, in words: the role `down` where that is all, else their names."""
    scaled = [layer for layer, one in zip(layers, found, strict=True) if one["inputs"]]
    down = [layer for layer in layers if layer.place.role == "down"]
    same = [layer.place.name for layer in scaled] == [layer.place.name for layer in down]
    return [{"inputs": "down" if same else ",".join(layer.place.name for layer in scaled)}] * len(found)


def write_ia3(part: SavedPart, site: SavedSite, writing: Writing) -> Writing:
    settings, _ = writing
    if "l_in" in site.tensors:
        return settings | {"feedforward_modules": [site.place.module]}, {"ia3_l": site.tensors["l_in"][None]}
    return settings, {"ia3_l": site.tensors["l"][:, None]}


def read_oft(layer: Layer, reading: Reading) -> Reading:
    """The exact branch of PEFT gives Rᵀ, hence −q; a shared block is repeated."""
    settings, tensors, _ = reading
    q = tensors["q"]
    size = round((1 + math.sqrt(1 + 8 * q.shape[1])) / 2)
    q = q.repeat(layer.shape[1] // size, 1) if layer.config.get("block_share") else q
    series = bool(layer.config.get("use_cayley_neumann", True))
    terms = int(layer.config.get("num_cayley_neumann_terms", 5)) if series else 0
    if series and terms < 4:
        raise refuse(f"OFT with num_cayley_neumann_terms={terms}", "fewer than four terms are summed in another way")
    return {**settings, "block_size": size, "terms": terms}, {"q": q if terms else -q}, {}


def write_oft(part: SavedPart, site: SavedSite, writing: Writing) -> Writing:
    settings, tensors = writing
    if part.method.limit:
        raise refuse("OFT with a limit", "PEFT projects in its forward pass, in another norm")
    terms = part.method.terms
    tensors["oft_R.weight"] = site.tensors["q"] if terms else -site.tensors["q"]
    series = {"use_cayley_neumann": bool(terms), "num_cayley_neumann_terms": terms or 5}
    return settings | series | {"r": 0, "oft_block_size": part.method.block_size}, tensors


def read_boft(layer: Layer, reading: Reading) -> Reading:
    _settings, tensors, _ = reading
    factors, _, size, _ = tensors["D"].shape
    return {"factors": factors, "block_size": size}, tensors | {"s": tensors["s"].flatten()}, {}


def write_boft(part: SavedPart, site: SavedSite, writing: Writing) -> Writing:
    settings, tensors = writing
    tensors["boft_s"] = tensors["boft_s"][:, None]
    sizes = {"boft_block_size": part.method.block_size, "boft_block_num": 0}
    return settings | sizes | {"boft_n_butterfly_factor": part.method.factors}, tensors


def read_hra(layer: Layer, reading: Reading) -> Reading:
    _settings, tensors, _ = reading
    rank = tensors["U"].shape[1]
    if rank % 2:
        raise refuse(f"HRA with r={rank}", "an odd number of reflections does not start as the identity")
    return {"rank": rank}, tensors, {}


ROAD = {"road_1": 1, "road_2": 2, "road_4": 4}


def read_road(layer: Layer, reading: Reading) -> Reading:
    settings, tensors, _ = reading
    return settings | {"angles": ROAD[layer.config.get("variant", "road_1")]}, tensors, {}


def write_road(part: SavedPart, site: SavedSite, writing: Writing) -> Writing:
    settings, tensors = writing
    return settings | {"variant": f"road_{part.method.angles}"}, tensors


def read_loha(layer: Layer, reading: Reading) -> Reading:
    settings, tensors, shared = reading
    return settings | {"rank": tensors["A1"].shape[0]}, tensors, shared


def read_lokr(layer: Layer, reading: Reading) -> Reading:
    """PEFT scales a full second factor too; here alpha / rank goes into it. A factored first one is multiplied out."""
    settings, tensors, _ = reading
    scale = settings["alpha"] / settings["rank"]
    if "C" not in tensors:
        tensors["C"] = layer.tensors["lokr_w1_a"] @ layer.tensors["lokr_w1_b"]
    if "D" in tensors:
        tensors["D"] = tensors["D"] * scale
    factor = max(0, int(layer.config.get("decompose_factor", -1)))
    return settings | {"factor": factor}, tensors, {}


def write_lokr(part: SavedPart, site: SavedSite, writing: Writing) -> Writing:
    settings, tensors = writing
    if "lokr_w2" in tensors:
        settings["alpha"] = part.method.rank
    return settings | {"decompose_factor": part.method.factor or -1}, tensors


def read_shira(layer: Layer, reading: Reading) -> Reading:
    _settings, tensors, _ = reading
    rows, cols = layer.tensors["shira_indices"].long()
    out, into = layer.shape
    return {"rank": len(rows) // (out + into), "mask": "random"}, tensors | {"index": rows * into + cols}, {}


def write_shira(part: SavedPart, site: SavedSite, writing: Writing) -> Writing:
    settings, tensors = writing
    index, into = site.tensors["index"], site.shape[1]
    if len(index) != part.method.rank * sum(site.shape):
        raise refuse(f"SHiRA at {site.place.name}", "PEFT wants rank·(in + out) entries, more than the weight has")
    places = torch.stack([index.div(into, rounding_mode="floor"), index.remainder(into)]).int()
    return settings, tensors | {"shira_indices": places}


def read_miss(layer: Layer, reading: Reading) -> Reading:
    settings, tensors, _ = reading
    rank, columns = tensors["D"].shape
    mini = layer.config.get("init_weights") == "mini"
    return settings | {"rank": rank, "columns": columns if mini else None}, tensors, {}


def write_miss(part: SavedPart, site: SavedSite, writing: Writing) -> Writing:
    settings, tensors = writing
    columns = part.method.columns
    return settings | ({"init_weights": "mini", "mini_r": columns} if columns else {"init_weights": True}), tensors


def read_bat(layer: Layer, reading: Reading) -> Reading:
    _settings, tensors, _ = reading
    return {"block_size": tensors["D"].shape[-1]}, tensors, {}


def read_gralora(layer: Layer, reading: Reading) -> Reading:
    """PEFT keeps both of its factors transposed."""
    settings, tensors, _ = reading
    A, B = tensors["A"].mT, tensors["B"].mT
    return settings | {"blocks": A.shape[0], "rank": A.shape[1]}, {"A": A, "B": B}, {}


def write_gralora(part: SavedPart, site: SavedSite, writing: Writing) -> Writing:
    settings, tensors = writing
    return settings, {key: value.mT for key, value in tensors.items()}


def read_hira(layer: Layer, reading: Reading) -> Reading:
    _settings, tensors, _ = reading
    return {"rank": tensors["A"].shape[0]}, tensors, {}


def read_beft(layer: Layer, reading: Reading) -> Reading:
    settings, tensors, _ = reading
    return settings, {"d": tensors["d"].flatten()}, {}


def write_beft(part: SavedPart, site: SavedSite, writing: Writing) -> Writing:
    settings, tensors = writing
    return settings, {"beft_bias": tensors["beft_bias"][None]}


def is_bat(config: Mapping[str, Any]) -> bool:
    return config.get("init_weights") == "bat"
