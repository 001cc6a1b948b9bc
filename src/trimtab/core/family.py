"""Families: which module of an architecture plays which role, as data; and the same table guessed from shapes.

A table file `trimtab/families/<name>.py` holds one `FAMILY = Family(...)`. Core never imports the tables by name: they
are found when the first model is looked at. A model no table knows gets a `Family` made up by `guess` from its own
shapes and names, so one engine (`trimtab.core.places`) serves both.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic

import torch
from torch import Tensor, nn

from trimtab.core.site import is_conv1d

CONTRIBUTIONS = frozenset({"attn", "ffn", "cross.attn"})
"""What sub-layers add to the residual stream."""
SINGLE = CONTRIBUTIONS | {"stream"}
"""Roles that name one module per block: the first pattern that exists wins. Other roles take all that exist."""


@dataclass(frozen=True)
class Family:
    """Which module of a model family plays which role. Pure data.

    Paths in `roles` start at the block; those in `blocks` and `outside` are matched at the end of the full path. A path
    may name a module (`mlp.down_proj`), a raw parameter (`mlp.experts.down_proj`), or a part of a fused one
    (`attn.c_attn:q`). `encoder/` in front limits it to that stack, and `*` stands for anything.
    """

    name: str
    """Equals the file name."""
    model_types: tuple[str, ...]
    """Values of `config.model_type` that this table describes."""
    blocks: Mapping[str, str | None]
    """End of the path of each list of blocks -> name of its stack (None where there is only one)."""
    roles: Mapping[str, str | tuple[str, ...]]
    """Role -> path or paths inside a block. Those in `SINGLE`: first that exists; else all that exist."""
    fused: Mapping[str, Mapping[str, int | str]] = field(default_factory=dict)
    """Path of a fused weight -> its parts in row order -> their share of the rows (a number or a config field).

    Each part is one range of rows; what has q, k and v head by head is in `by_head`.
    """
    by_head: tuple[str, ...] = ()
    """Paths of fused weights whose rows come head by head: for every key head its queries, the key, the value."""
    transposed: tuple[str, ...] = ()
    """Raw expert parameters stored (experts, in, out) instead of (experts, out, in)."""
    outside: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    """Roles of modules outside the blocks, `embed` above all."""
    enters: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    """`attn`, `ffn`, `cross.attn` -> the module of a block whose input is the residual stream as this sub-layer takes
    it in: the norm in front of it, or where there is none the sub-layer's own first module. First that exists."""


def paths_of(patterns: str | Sequence[str]) -> tuple[str, ...]:
    """One pattern or several, as a tuple."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


@functools.cache
def tables() -> Mapping[str, Family]:
    """`config.model_type` -> table, over all files of `trimtab.families`; read once, at the first question."""
    package = importlib.import_module("trimtab.families")
    found: dict[str, Family] = {}
    for info in pkgutil.iter_modules(package.__path__):
        family: Family = importlib.import_module(f"{package.__name__}.{info.name}").FAMILY
        if family.name != info.name:
            raise ValueError(f"families/{info.name}.py calls itself {family.name!r}")
        for model_type in family.model_types:
            if model_type in found:
                raise ValueError(f"model type {model_type!r} is in families {found[model_type].name} and {family.name}")
            found[model_type] = family
    return found


def regions(model: nn.Module) -> list[tuple[str, nn.Module, Family]]:
    """(path, module, table) of the outermost modules whose `config.model_type` is in a table.

    Usually the model itself; inside a wrapper or a composite model, the parts that are known.
    """
    found: list[tuple[str, nn.Module, Family]] = []
    for path, module in walk(model):
        family = tables().get(_model_type(module))
        if family is not None and not any(within(path, outer) for outer, _, _ in found):
            found.append((path, module, family))
    return found


def family_of(model: nn.Module) -> Family | None:
    """The table of a model, by `config.model_type` (its own, or that of the first known part); None means shapes."""
    found = regions(model)
    return found[0][2] if found else None


def _model_type(module: nn.Module) -> str:
    model_type = getattr(getattr(module, "config", None), "model_type", None)
    return model_type if isinstance(model_type, str) else ""


# ---------------------------------------------------------------- modules, as the tables and the guesses see them


def within(path: str, outer: str) -> bool:
    """Whether a dotted path is `outer` or below it; everything is below the root, ""."""
    return not outer or (path.startswith(outer) and path[len(outer) : len(outer) + 1] in ("", "."))


def join(*names: str) -> str:
    """A dotted path from its non-empty pieces."""
    return ".".join(name for name in names if name)


def walk(module: nn.Module, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) in model order, each module once, leaving out what Trimtab or torch installed on it."""
    seen = set() if seen is None else seen
    if id(module) in seen:
        return
    seen.add(id(module))
    yield path, module
    for name, child in module._modules.items():
        if child is not None and not is_installed(child):
            yield from walk(child, join(path, name), seen)


def is_installed(module: nn.Module) -> bool:
    """Whether a child holds adapters, a quantized record or parametrizations rather than a part of the model."""
    if isinstance(module, torch.nn.utils.parametrize.ParametrizationList):
        return True
    if type(module) is nn.ModuleDict:
        return len(module) > 0 and all(is_installed(child) for child in module.values())
    own = [cls for cls in type(module).__mro__ if cls not in (nn.Module, nn.ModuleDict, object, ABC, Generic)]
    return bool(own) and all(cls.__module__.startswith("trimtab.core.") for cls in own)


def raw_parameter(module: nn.Module, name: str) -> Tensor | None:
    """A parameter by name, seen through a torch parametrization without computing it."""
    parametrized = module._modules.get("parametrizations")
    if parametrized is not None and name in parametrized._modules:
        original = getattr(parametrized._modules[name], "original", None)
        return original if isinstance(original, Tensor) else None
    return module._parameters.get(name)


def parameter_names(module: nn.Module) -> list[str]:
    """Names of a module's own parameters, those under a torch parametrization included."""
    parametrized = module._modules.get("parametrizations")
    return [*module._parameters, *(parametrized._modules if parametrized is not None else ())]


def kind(module: nn.Module) -> str:
    """linear, embedding, conv, norm, or opaque (known by its output only).

    Linear: nn.Linear and its quantized swaps, Conv1D, anything else with a weight and both feature counts. Norm: a
    module without children whose weight is 1-D. Opaque: torch's attention, which reads its weights raw; routers, which
    may be a Linear by class but return their choice of experts; transposed convolutions.
    """
    if any("Router" in cls.__name__ for cls in type(module).__mro__):
        return "opaque"
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "opaque" if isinstance(module, nn.modules.conv._ConvTransposeNd) else "conv"
    weight = raw_parameter(module, "weight")
    packed = module._buffers.get("qweight", module._parameters.get("qweight"))
    matrix = weight if weight is not None else packed
    if matrix is not None and matrix.ndim == 2 and widths(module) is not None:
        return "linear"
    if weight is not None and weight.ndim == 1 and not _is_compound(module) and not isinstance(module, nn.PReLU):
        return "norm"
    return "opaque"


def widths(module: nn.Module) -> tuple[int, int] | None:
    """Canonical (out, in) of a linear-like module, without touching its weight; None where it does not say."""
    if is_conv1d(module):
        nx = getattr(module, "nx", None)
        weight = raw_parameter(module, "weight")
        return int(module.nf), int(nx if nx is not None else weight.shape[0])  # type: ignore[arg-type,union-attr]
    out = getattr(module, "out_features", getattr(module, "outfeatures", None))
    into = getattr(module, "in_features", getattr(module, "infeatures", None))
    return (out, into) if isinstance(out, int) and isinstance(into, int) else None


def is_raw_projection(parent: nn.Module | None, name: str) -> bool:
    """Whether this child is a Linear that its parent never calls, but whose weight it reads (torch's attention)."""
    return isinstance(parent, nn.MultiheadAttention) and name == "out_proj"


# ---------------------------------------------------------------- a table guessed from names and shapes

NAMES: Mapping[str, re.Pattern[str]] = {
    "q": re.compile("q|query|wq|w_q|to_q|fc_q|q_proj|query_proj|q_lin|q_linear|linear_q|q_attn|query_layer"),
    "k": re.compile("k|key|wk|w_k|to_k|fc_k|k_proj|key_proj|k_lin|k_linear|linear_k|key_layer"),
    "v": re.compile("v|value|wv|w_v|to_v|fc_v|v_proj|value_proj|v_lin|v_linear|linear_v|value_layer"),
    "gate": re.compile("gate_proj|wi_0|linear_gate|fc1_g"),
    "up": re.compile(
        "up_proj|fc1|lin1|linear1|c_fc|dense_h_to_4h|wi|wi_1|fc_in|linear_up|fc1_x|w3|ff1|gate_up_proj|w12"
    ),
    "down": re.compile("down_proj|fc2|lin2|linear2|dense_4h_to_h|fc_out|linear_down|w2|ff2"),
}
OUTPUT = re.compile("o|out|wo|w_o|to_out|o_proj|out_proj|proj_out|out_lin|out_linear|linear_out|proj|c_proj|dense")
FUSED = re.compile("qkv|wqkv|to_qkv|c_attn|in_proj|att_proj|qkv_proj|qkv_linear|query_key_value")
RANGES = re.compile("qkv|wqkv|to_qkv|c_attn|in_proj|att_proj")
"""Fused names whose thirds are q, k, v by custom. `query_key_value` and `qkv_proj` often interleave the heads."""
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
CROSS = re.compile(r"cross|encoder_attn|enc_?dec|encdec|multihead_attn|src_attn|xattn", re.IGNORECASE)
EXPERTS: Mapping[str, str] = {
    "gate_up_proj": "expert_gate_up",
    **dict.fromkeys(("gate_proj", "w1"), "expert_gate"),
    **dict.fromkeys(("up_proj", "w3"), "expert_up"),
    **dict.fromkeys(("down_proj", "w2"), "expert_down"),
}
STACKS = (
    ("vision", re.compile(r"vision|visual|image", re.IGNORECASE)),
    ("decoder", re.compile(r"decoder", re.IGNORECASE)),
    ("encoder", re.compile(r"encoder", re.IGNORECASE)),
)
BEFORE: Mapping[str, re.Pattern[str]] = {
    "attn": re.compile("(pre_?)?(self_?)?att(entio)?n_(layer_?)?norm|input_layer_?norm|(ln|norm|layer_?norm)_?1"),
    "ffn": re.compile(
        "(pre_?)?(mlp|ffn|ff|feed_?forward)_(layer_?)?norm|pre_(mlp|feedforward)_layer_?norm|"
        "post_attention_layer_?norm|(ln|norm|layer_?norm)_?2"
    ),
}
"""What a norm in front of a sub-layer is called."""
POSITIONS = re.compile(r"pos|type|segment|time", re.IGNORECASE)


def guess(model: nn.Module) -> Family:
    """A table for a model no file knows: blocks from repetition, roles from well-known names, fused qkv from shape.

    Blocks are the longest list (ModuleList or Sequential) of modules of one class, lists inside such a block left out;
    stages that are little more than a list of blocks count as their blocks, in sequence. Where a decoder has a list
    beside the encoder's, or a vision part beside another, each is a stack. `attn` and `ffn` are the output and down
    projections, the MoE module where there are experts, and in torch's own layers the dropout behind them.
    """
    lists = _block_lists(model)
    roles: dict[str, list[str]] = {}
    outside: dict[str, list[str]] = {}
    enters: dict[str, list[str]] = {}
    fused: dict[str, Mapping[str, int | str]] = {}
    transposed: list[str] = []

    def put(table: dict[str, list[str]], role: str, path: str) -> None:
        if path not in table.setdefault(role, []):
            table[role].append(path)

    blocks: dict[str, str | None] = {}
    for path, (stack, members) in lists.items():
        blocks[path] = stack
        limit = f"{stack}/" if stack else ""
        for member in members:
            for role, inner in _block_roles(member, fused, transposed):
                put(roles, role, limit + inner)
            for role, inner in _entrances(member):
                put(enters, role, limit + inner)
    for path, module in walk(model):
        if any(within(path, outer) for outer in lists):
            continue
        for role, inner in _attention_roles(module, path, fused):
            put(outside, role, inner)
    for path in token_embeddings(model, tuple(lists)):
        put(outside, "embed", path)
    return Family(
        name=type(model).__name__,
        model_types=(),
        blocks=blocks,
        roles={role: tuple(paths) for role, paths in roles.items()},
        fused=fused,
        transposed=tuple(transposed),
        outside={role: tuple(paths) for role, paths in outside.items()},
        enters={role: tuple(paths) for role, paths in enters.items()},
    )


def _block_lists(model: nn.Module) -> dict[str, tuple[str | None, list[nn.Module]]]:
    """Path of each list of blocks -> (stack, blocks), in model order."""
    best: dict[str | None, tuple[str, list[nn.Module]]] = {}
    for path, members in _repetitions(model):
        stack = next((name for name, token in STACKS if token.search(path)), None)
        if stack not in best or _weight_of(members) > _weight_of(best[stack][1]):
            best[stack] = (path, members)
    if "encoder" in best and "decoder" not in best:
        rivals = [best.pop("encoder"), *([best.pop(None)] if None in best else [])]
        best[None] = max(rivals, key=lambda entry: _weight_of(entry[1]))
    alone = len(best) == 1
    found: dict[str, tuple[str | None, list[nn.Module]]] = {}
    for stack, (path, members) in best.items():
        for inner, blocks in _stages(path, members):
            found[inner] = (None if alone else stack, blocks)
    return found


def _repetitions(model: nn.Module) -> list[tuple[str, list[nn.Module]]]:
    """(path, members) of the outermost lists of modules of one class; lists of single layers if there are no others."""
    candidates: list[tuple[str, list[nn.Module]]] = []
    for path, module in walk(model):
        if not isinstance(module, nn.ModuleList | nn.Sequential) or not len(module):
            continue
        members = list(module)
        if not _alike(members) or not all(_has_site(member) for member in members):
            continue
        if len(members) == 1 and (isinstance(module, nn.Sequential) or not _is_compound(members[0])):
            continue
        candidates.append((path, members))
    compound = [entry for entry in candidates if all(_is_compound(member) for member in entry[1])]
    chosen = compound or candidates
    return [
        (path, members)
        for path, members in chosen
        if not any(other != path and within(path, other) for other, _ in chosen)
    ]


def _stages(path: str, members: list[nn.Module]) -> list[tuple[str, list[nn.Module]]]:
    """The lists inside a list of stages (Swin, ResNet), where each stage is one list and attends nowhere else."""
    found: list[tuple[str, list[nn.Module]]] = []
    for index, member in enumerate(members):
        inner = [entry for entry in _repetitions(member) if all(_is_compound(block) for block in entry[1])]
        if len(inner) != 1:
            return [(path, members)]
        below, blocks = inner[0]
        beside = [role for role, at in _block_roles(member, {}, []) if not within(at, below)]
        if any(role in ("q", "k", "v", "qkv", "o") for role in beside):
            return [(path, members)]
        found.append((join(path, str(index), below), blocks))
    return found if _alike([block for _, blocks in found for block in blocks]) else [(path, members)]


def _alike(members: list[nn.Module]) -> bool:
    """Whether all are of one class; a class that was swapped for a subclass of it counts as it."""
    common = min((type(member) for member in members), key=lambda cls: len(cls.__mro__))
    return all(isinstance(member, common) for member in members)


def _weight_of(members: list[nn.Module]) -> tuple[int, int]:
    return len(members), sum(parameter.numel() for member in members for parameter in member.parameters())


def _is_compound(module: nn.Module) -> bool:
    return any(not is_installed(child) for child in module._modules.values() if child is not None)


def _has_site(module: nn.Module) -> bool:
    return any(kind(inner) != "opaque" or isinstance(inner, nn.MultiheadAttention) for _, inner in walk(module))


def _block_roles(
    block: nn.Module, fused: dict[str, Mapping[str, int | str]], transposed: list[str]
) -> Iterator[tuple[str, str]]:
    """(role, path inside the block); what is fused or transposed is noted on the way."""
    found: list[tuple[str, str]] = []
    for path, module in walk(block):
        found += _attention_roles(module, path, fused)
        found += _feed_forward_roles(module, path)
        found += _expert_roles(module, path, fused, transposed)
    if not any(role in ("up", "gate_up") for role, _ in found):
        found += _by_shape(block, {path for _, path in found})
    yield from found
    if isinstance(block, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        crossed = isinstance(block, nn.TransformerDecoderLayer)
        yield "attn", "dropout1"
        if crossed:
            yield "cross.attn", "dropout2"
        yield "ffn", "dropout3" if crossed else "dropout2"
        if not block.norm_first:
            yield "stream", "norm3" if crossed else "norm2"
        return
    mixtures = {path.rpartition(".")[0].rpartition(".")[0] for role, path in found if role.startswith("expert_")}
    for path in sorted(mixtures):
        if path:
            yield "ffn", path
    for role, path in found:
        if role in ("o", "cross.o"):
            raw = path.endswith(".out_proj.weight")
            yield role[:-1] + "attn", path.removesuffix(".out_proj.weight") if raw else path
        elif role == "down" and not any(within(path, mixture) for mixture in mixtures):
            yield "ffn", path


def _entrances(block: nn.Module) -> Iterator[tuple[str, str]]:
    """(sub-layer, the module whose input is the residual stream in front of it) of a block no table describes.

    Norms count whose name says what they stand before; a norm that runs behind its sub-layer has not been passed when
    that one runs, which is an error then.
    """
    if isinstance(block, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        crossed = isinstance(block, nn.TransformerDecoderLayer)
        first = ["norm1", *(["norm2"] if crossed else []), "norm3" if crossed else "norm2"]
        plain = ["self_attn", *(["multihead_attn"] if crossed else []), "linear1"]
        roles = ["attn", *(["cross.attn"] if crossed else []), "ffn"]
        yield from zip(roles, first if block.norm_first else plain, strict=True)
        return
    for name, child in block._modules.items():
        if child is not None and kind(child) == "norm":
            yield from ((role, name) for role, words in BEFORE.items() if words.fullmatch(name.lower()))


def _linears(module: nn.Module) -> dict[str, nn.Module]:
    """Direct children that are linear-like; `to_out.0` of a Sequential counts as `to_out`."""
    found: dict[str, nn.Module] = {}
    for name, child in module._modules.items():
        if child is None or is_raw_projection(module, name) or is_installed(child):
            continue
        if kind(child) == "linear":
            found[name] = child
        elif (
            isinstance(child, nn.Sequential)
            and len(child)
            and OUTPUT.fullmatch(name.lower())
            and kind(child[0]) == "linear"
        ):
            found[f"{name}.0"] = child[0]
    return found


def _attention_roles(module: nn.Module, path: str, fused: dict[str, Mapping[str, int | str]]) -> list[tuple[str, str]]:
    """Roles of the direct children of one module, as attention projections."""
    cross = "cross." if CROSS.search(path) else ""
    thirds = {"q": 1, "k": 1, "v": 1}
    found: list[tuple[str, str]] = []
    if isinstance(module, nn.MultiheadAttention):
        if raw_parameter(module, "in_proj_weight") is not None:
            whole = join(path, "in_proj_weight")
            fused[whole] = thirds
            found.append((f"{cross}qkv", whole))
            found += [(cross + part, f"{whole}:{part}") for part in thirds]
        else:
            found += [(cross + part, join(path, f"{part}_proj_weight")) for part in thirds]
        return [*found, (f"{cross}o", join(path, "out_proj.weight"))]
    children = _linears(module)
    for name, child in children.items():
        leaf = name.split(".")[0].lower()
        for role in ("q", "k", "v"):
            if NAMES[role].fullmatch(leaf):
                found.append((cross + role, join(path, name)))
        out_in = widths(child)
        if FUSED.fullmatch(leaf) and out_in is not None and (leaf != "in_proj" or ATTENTION.search(path)):
            whole = join(path, name)
            found.append((f"{cross}qkv", whole))
            if RANGES.fullmatch(leaf) and out_in[0] == 3 * out_in[1]:
                fused[whole] = thirds
                found += [(cross + part, f"{whole}:{part}") for part in thirds]
    attending = bool(found) or ATTENTION.search(path) is not None
    taken = {inner.split(":")[0] for _, inner in found}
    for name in children:
        if attending and OUTPUT.fullmatch(name.split(".")[0].lower()) and join(path, name) not in taken:
            found.append((f"{cross}o", join(path, name)))
    return found


def _feed_forward_roles(module: nn.Module, path: str) -> list[tuple[str, str]]:
    """Roles of the direct children of one module, as feed-forward projections."""
    children = _linears(module)
    names = {name.lower() for name in children}
    last = path.rsplit(".", 1)[-1]
    attending = ATTENTION.search(path) is not None or any(
        NAMES[role].fullmatch(name) for role in "qkv" for name in names
    )
    found = []
    for name in children:
        leaf = name.split(".")[0].lower()
        role = next((role for role in ("gate", "up", "down") if NAMES[role].fullmatch(leaf)), None)
        if leaf == "w1":
            role = "gate" if "w3" in names else "up"
        elif leaf == "dense" and not attending:
            role = {"intermediate": "up", "output": "down"}.get(last)
        elif (leaf == "wo" and names & {"wi", "wi_0"}) or (leaf == "c_proj" and not attending):
            role = "down"
        if role is not None:
            found.append((role, join(path, name)))
    into = {size[1] for role, at in found if role == "down" and (size := widths(children[_last(at, path)]))}
    for index, (role, at) in enumerate(found):
        size = widths(children[_last(at, path)])
        if role == "up" and size is not None and size[0] % 2 == 0 and into == {size[0] // 2}:
            found[index] = ("gate_up", at)
    return found


def _last(path: str, outer: str) -> str:
    return path[len(outer) + 1 :] if outer else path


def _expert_roles(
    module: nn.Module, path: str, fused: dict[str, Mapping[str, int | str]], transposed: list[str]
) -> list[tuple[str, str]]:
    """Raw 3-D expert tensors of one module; orientation and layout from the attributes transformers puts on it."""
    found = []
    for name in parameter_names(module):
        role, parameter = EXPERTS.get(name), raw_parameter(module, name)
        if parameter is None or parameter.ndim != 3 or role is None:
            continue
        whole = join(path, name)
        found.append((role, whole))
        if getattr(module, "is_transposed", False) and whole not in transposed:
            transposed.append(whole)
        if role == "expert_gate_up" and getattr(module, "is_concatenated", False):
            fused[whole] = {"gate": 1, "up": 1}
            found += [("expert_gate", f"{whole}:gate"), ("expert_up", f"{whole}:up")]
    return found


def _by_shape(block: nn.Module, taken: set[str]) -> list[tuple[str, str]]:
    """A feed-forward pair without telling names: two linears of one module, d -> wider -> d, that nothing else is."""
    for path, module in walk(block):
        inside = [(join(path, inner), child) for inner, child in walk(module) if kind(child) == "linear"]
        pair = [(name, widths(child)) for name, child in inside if name not in taken and not ATTENTION.search(name)]
        if len(pair) != 2:
            continue
        (first, up), (second, down) = pair
        if up is not None and down is not None and up == down[::-1] and up[0] > up[1]:
            return [("up", first), ("down", second)]
    return []


def token_embeddings(model: nn.Module, blocks: tuple[str, ...]) -> list[str]:
    """Where the input becomes vectors: what the model says; else the embedding a linear shares its weight with; else
    the one with most rows that is not of positions. Tied copies are in, a `shared` one that only lends its weight not.
    """
    modules = {path: module for path, module in walk(model) if not any(within(path, outer) for outer in blocks)}
    found = {path: module for path, module in modules.items() if isinstance(module, nn.Embedding)}
    told = next((module for module in modules.values() if hasattr(module, "get_input_embeddings")), None)
    try:
        said = told.get_input_embeddings() if told is not None else None  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        said = None
    chosen = next((path for path, module in found.items() if module is said), None)
    if chosen is None and isinstance(said, nn.Module):
        inside = {id(module) for _, module in walk(said)}
        own = {path: module for path, module in modules.items() if id(module) in inside}
        sites = [path for path, module in own.items() if kind(module) in ("conv", "linear")]
        return sites if len(sites) == 1 else []
    if chosen is None and found:
        lent = {id(raw_parameter(module, "weight")) for module in modules.values() if kind(module) == "linear"}
        likely = {path: module for path, module in found.items() if id(raw_parameter(module, "weight")) in lent}
        likely = likely or {path: module for path, module in found.items() if not POSITIONS.search(path)} or found
        chosen = max(likely, key=lambda path: found[path].num_embeddings)
    if chosen is None:
        return []
    weight = raw_parameter(found[chosen], "weight")
    tied = [path for path, module in found.items() if raw_parameter(module, "weight") is weight]
    return [path for path in tied if path.rsplit(".", 1)[-1] != "shared"] or tied
