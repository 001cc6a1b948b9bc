"""The table of a model no file knows, guessed from its names and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import nn

from trimtab.core.family import Family
from trimtab.core.modules import (
    is_compound,
    is_installed,
    is_raw_projection,
    join,
    kind,
    parameter_names,
    raw_parameter,
    walk,
    widths,
    within,
)

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
        if len(members) == 1 and (isinstance(module, nn.Sequential) or not is_compound(members[0])):
            continue
        candidates.append((path, members))
    compound = [entry for entry in candidates if all(is_compound(member) for member in entry[1])]
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
        inner = [entry for entry in _repetitions(member) if all(is_compound(block) for block in entry[1])]
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
