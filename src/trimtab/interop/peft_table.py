"""Which PEFT type is which method of ours, and under which names both keep the same tensors: data, one row each.

A tensor that both write alike stands in `tensors` and no more; where the arithmetic differs a row has a pair of small
functions. Settings that only steer training and have no counterpart (`rank_dropout`, `init_weights`) are passed over;
those that change what is computed and cannot be had here stand in `fixed` and are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.low_rank import key_of
from trimtab.core.places import Place
from trimtab.core.site import Site
from trimtab.interop.saved import SavedPart, SavedSite

Tensors = dict[str, Tensor]
GROUP = "@group"
"""Among the settings of a site: what has to be equal for two sites to be one part."""


@dataclass
class Layer:
    """The tensors that a PEFT file has for one module, and what the file and the model say about it."""

    place: Place
    shape: tuple[int, int]
    tensors: Tensors
    config: Mapping[str, Any]
    shared: Tensors
    module: nn.Module

    @property
    def conv1d(self) -> bool:
        """Whether it is GPT-2's transposed linear layer."""
        return hasattr(self.module, "nf")


Settings = dict[str, Any]
Reading = tuple[Settings, Tensors, Tensors]
"""Settings of the method, its tensors at one site, and what its sites share."""
Writing = tuple[Settings, Tensors]
"""Entries of PEFT's config, and its tensors at one module."""


@dataclass(frozen=True)
class Row:
    """One PEFT type beside one method."""

    peft: str
    method: str
    tensors: Mapping[str, str] = field(default_factory=dict)
    """Name at a module in PEFT's file -> name at a site in ours."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Field of the method -> key of PEFT's config."""
    patterns: Mapping[str, str] = field(default_factory=dict)
    """Field of the method -> key of PEFT's config that sets it for some modules."""
    shared: Mapping[str, str] = field(default_factory=dict)
    """Name at the root of PEFT's file -> name among what sites share."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Keys of PEFT's config with the one value that is understood."""
    constant: Mapping[str, Any] = field(default_factory=dict)
    """Keys that PEFT's config gets whatever the method."""
    read: Callable[[Layer, Reading], Reading] | None = None
    write: Callable[[SavedPart, SavedSite, Writing], Writing] | None = None
    conv1d: bool = True
    """Whether PEFT puts it on GPT-2's Conv1D."""
    optional: frozenset[str] = frozenset()
    """Tensors of `tensors` that a file may lack."""
    ignored: frozenset[str] = frozenset()
    """Tensors at a module that repeat what stands elsewhere in the file."""
    chosen: Callable[[Mapping[str, Any]], bool] | None = None
    """Which of several rows of one PEFT type a config means."""
    share: Callable[[Sequence[Layer], Tensors], Tensors] | None = None
    """What the layers of one part use together, out of what all layers of the file do."""
    unshare: Callable[[SavedPart], Tensors] | None = None
    """The inverse, by PEFT's names."""
    gather: Callable[[Sequence[Layer], list[Settings]], list[Settings]] | None = None
    """Settings that only all layers together decide."""


def refuse(what: str, why: str, fix: str | None = None) -> UserError:
    """An error about something one of the two formats cannot say."""
    return UserError(f"PEFT: {what}: {why}", fix=fix)


def site_of(layer: Layer) -> Site:
    """A stand-in for the site of a layer, with its name and role."""
    return Site(layer.place.name, None, layer.place.kind, role=layer.place.role)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ AdaLoRA


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


# ------------------------------------------------------------------------------------------------------ random bases


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


# --------------------------------------------------------------------------------------------------- rotations, scales


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


# ------------------------------------------------------------------------------------------- products, masks, the rest


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


RANKS = {"rank": "rank_pattern", "alpha": "alpha_pattern"}

ROWS: tuple[Row, ...] = (
    Row(
        *("ADALORA", "adalora"),
        {"lora_A": "Q", "lora_B": "P", "lora_E": "lambda_"},
        {"rank": "init_r", "target": "target_r", "alpha": "lora_alpha", "dropout": "lora_dropout"},
        read=read_adalora,
        share=share_adalora,
        write=write_adalora,
    ),
    Row(
        *("VERA", "vera"),
        {"vera_lambda_b": "b", "vera_lambda_d": "d"},
        {"rank": "r", "dropout": "vera_dropout"},
        shared={"vera_A": "A", "vera_B": "B"},
        constant={"save_projection": True},
        read=read_vera,
        share=share_vera,
    ),
    Row(*("IA3", "ia3"), {"ia3_l": "l"}, read=read_ia3, write=write_ia3, gather=gather_ia3),
    Row(
        *("LOHA", "loha"),
        {"hada_w1_a": "B1", "hada_w1_b": "A1", "hada_w2_a": "B2", "hada_w2_b": "A2"},
        {"rank": "r", "alpha": "alpha"},
        RANKS,
        fixed={"use_effective_conv2d": False},
        read=read_loha,
        conv1d=False,
    ),
    Row(
        *("LOKR", "lokr"),
        {"lokr_w1": "C", "lokr_w2": "D", "lokr_w2_a": "B", "lokr_w2_b": "A"},
        {"rank": "r", "alpha": "alpha"},
        RANKS,
        fixed={"use_effective_conv2d": False},
        read=read_lokr,
        write=write_lokr,
        conv1d=False,
        optional=frozenset({"lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_w1_a", "lokr_w1_b"}),
        ignored=frozenset({"lokr_w1_a", "lokr_w1_b"}),
    ),
    Row(
        *("OFT", "oft"),
        {"oft_R.weight": "q"},
        {"block_size": "oft_block_size", "dropout": "module_dropout"},
        fixed={"coft": False},
        read=read_oft,
        write=write_oft,
        conv1d=False,
    ),
    Row(
        *("BOFT", "boft"),
        {"boft_R": "D", "boft_s": "s"},
        {"block_size": "boft_block_size"},
        read=read_boft,
        write=write_boft,
        conv1d=False,
    ),
    Row(
        *("HRA", "hra"),
        {"hra_u": "U"},
        {"rank": "r"},
        fixed={"apply_GS": False},
        read=read_hra,
        conv1d=False,
    ),
    Row(
        *("FOURIERFT", "fourier_ft"),
        {"fourierft_spectrum": "c"},
        {"coefficients": "n_frequency", "alpha": "scaling", "entry_seed": "random_loc_seed"},
        {"coefficients": "n_frequency_pattern"},
        read=read_fourier,
        write=write_fourier,
    ),
    Row(
        *("RANDLORA", "randlora"),
        {"randlora_lambda": "lambda_", "randlora_gamma": "gamma"},
        {"rank": "r", "alpha": "randlora_alpha", "dropout": "randlora_dropout"},
        shared={"randlora_A": "A", "randlora_B": "B"},
        constant={"save_projection": True},
        read=read_randlora,
        write=write_randlora,
        share=share_randlora,
        unshare=unshare_randlora,
        ignored=frozenset({"randlora_A", "randlora_B"}),
    ),
    Row(
        *("VBLORA", "vb_lora"),
        {"vblora_logits_A": "a", "vblora_logits_B": "b"},
        {"rank": "r", "k": "topk", "vectors": "num_vectors", "length": "vector_length", "dropout": "vblora_dropout"},
        shared={"vblora_vector_bank": "bank"},
        constant={"save_only_topk_weights": False},
        read=read_vblora,
        write=write_vblora,
        optional=frozenset({"vblora_logits_A", "vblora_logits_B"}),
        ignored=frozenset(f"vblora_logits_{side}_topk_{kind}" for side in "AB" for kind in ("indices", "weights")),
    ),
    Row(
        *("SHIRA", "shira"),
        {"shira_weight": "value"},
        {"rank": "r"},
        read=read_shira,
        write=write_shira,
        conv1d=False,
        ignored=frozenset({"shira_indices"}),
    ),
    Row(
        *("C3A", "c3a"),
        {"c3a_kernel": "w"},
        {"block_size": "block_size"},
        {"block_size": "block_size_pattern"},
        constant={"init_weights": True},
        conv1d=False,
    ),
    Row(
        *("MISS", "bat"),
        {"miss_block": "D"},
        {"block_size": "r"},
        constant={"init_weights": "bat"},
        read=read_bat,
        conv1d=False,
        chosen=is_bat,
    ),
    Row(
        *("MISS", "miss"),
        {"miss_block": "D"},
        {"rank": "r", "dropout": "miss_dropout"},
        read=read_miss,
        write=write_miss,
        conv1d=False,
    ),
    Row(
        *("ROAD", "road"),
        {"road_theta": "theta", "road_alpha": "alpha"},
        {"group_size": "group_size"},
        read=read_road,
        write=write_road,
        conv1d=False,
    ),
    Row(
        *("HIRA", "hira"),
        {"hira_A": "A", "hira_B": "B"},
        {"rank": "r"},
        read=read_hira,
    ),
    Row(
        *("GRALORA", "gralora"),
        {"gralora_A": "A", "gralora_B": "B"},
        {"rank": "r", "alpha": "alpha", "blocks": "gralora_k", "dropout": "gralora_dropout"},
        fixed={"hybrid_r": 0},
        read=read_gralora,
        write=write_gralora,
    ),
    Row(*("BEFT", "output_bias"), {"beft_bias": "d"}, read=read_beft, write=write_beft, conv1d=False),
)
"""Everything that sits on weights and is no LoRA; LoRA, prompts and plain copies have files of their own."""

PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT")
COPIES = ("LN_TUNING", "TRAINABLE_TOKENS")


def row_of(config: Mapping[str, Any]) -> Row | None:
    """The row that a PEFT config means."""
    rows = [row for row in ROWS if row.peft == config.get("peft_type")]
    return next((row for row in rows if row.chosen and row.chosen(config)), rows[-1] if rows else None)


def row_for(method: str) -> Row | None:
    """The row of one of our methods."""
    return next((row for row in ROWS if row.method == method), None)


def known_types() -> list[str]:
    """Every PEFT type that is read."""
    return sorted({"LORA", *PROMPTS, *COPIES, *(row.peft for row in ROWS)})
