"""The `where` language: which places of a model a method is put at.

    where = "q, v@8:, !encoder/k"        comma separated terms

A term is one of

    role          q k v o qkv  gate up down gate_up  attn ffn block stream  norm embed head  attention
                  cross.q cross.k cross.v cross.o cross.qkv cross.kv cross.attn        (attention to another stream)
                  expert_gate expert_up expert_down expert_gate_up                     (3-D expert tensors)
    all-linear    every linear of the model except the output head and whatever shares an embedding's weight; the raw
                  2-D weights of torch's attention too. Expert tensors are not in it: name them
    all           every place with a weight: linears, embeddings, convolutions, norms, raw tensors; no tied head
    path          a full path, the end of one (`q_proj`, `mlp.down_proj`) or a glob (`*.mlp.*`)

and may carry

    !             in front: take these places away again, whatever the order of the terms
    stack/        in front: `encoder/q`, `decoder/q`, `vision/q`
    :part         behind: a part of a fused weight, `c_attn:q`
    @range        behind: layers with Python's meaning, `q@8:` `v@-4:` `ffn@0:6` `block@-1` `q@::2`; every stack counts
                  its own layers from 0

`qkv` stands for the fused weight where there is one and for q, k and v where not; `gate_up` and `expert_gate_up`
likewise. A role's name is never read as a path: a module that happens to be called `gate` is `*.gate`. Taking a part
away from a chosen whole (`all-linear, !q` in GPT-2) leaves its other parts; a part chosen beside its whole is dropped.

`attention` is what the queries of self-attention find, before `o`: the module around q, k and v where these are
called. `attn`, `ffn` and `cross.attn` are the module whose output a sub-layer adds to the residual stream: after the
output projection, its dropout where that is a module of its own, and a norm that comes before the addition (Gemma 2 and
3, OLMo 2); before the addition and before a norm that comes after it (BERT). `block` is the whole layer, and `stream`
what puts out the residual stream behind the feed-forward: the norm after the addition where there is one, else the
block. Some modules return a tuple whose first entry is meant (T5's and MPNet's blocks, the MoE of gpt-oss).

Every term has to match something, and everything that does not is told at once.
"""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from trimtab.core.errors import UserError, listing, nearest
from trimtab.core.family import (
    CONTRIBUTIONS,
    SINGLE,
    Family,
    guess,
    is_raw_projection,
    join,
    kind,
    parameter_names,
    paths_of,
    raw_parameter,
    regions,
    walk,
    widths,
    within,
)

ROLES = (
    *("q", "k", "v", "o", "qkv", "gate", "up", "down", "gate_up", "attn", "ffn", "block"),
    *("stream", "norm", "embed", "head", "attention"),
    *("cross.q", "cross.k", "cross.v", "cross.o", "cross.qkv", "cross.kv", "cross.attn"),
    *("expert_gate", "expert_up", "expert_down", "expert_gate_up"),
)
"""Every role there is. A family has some of them."""
KINDS = ("linear", "embedding", "conv", "norm", "raw", "attention", "opaque")
"""Kinds of place. `raw` is a parameter without a module to call; `opaque` is known by its output only."""
WEIGHTLESS = ("attention", "opaque")
TOGETHER: Mapping[str, tuple[str, ...]] = {
    "qkv": ("q", "k", "v"),
    "cross.qkv": ("cross.q", "cross.k", "cross.v"),
    "cross.kv": ("cross.k", "cross.v"),
    "gate_up": ("gate", "up"),
    "expert_gate_up": ("expert_gate", "expert_up"),
    "stream": ("block",),
}
"""What a fused role means where it is not fused, and `stream` where no norm follows the addition."""
PLURALS = {
    "linear": "linears",
    "embedding": "embeddings",
    "conv": "convolutions",
    "norm": "norms",
    "raw": "raw tensors",
    "attention": "attentions",
    "opaque": "opaque modules",
}


@dataclass(frozen=True)
class Place:
    """Somewhere in a model a method can be put: a module, a raw parameter of one, or a range of their output rows."""

    module: str
    """Dotted path of the module from the root model; "" is the root."""
    parameter: str | None = None
    """A raw parameter of that module, which is read and never called (`in_proj_weight`); None = the module itself."""
    part: str | None = None
    """Name of a range of output rows (`q` of a fused qkv); None = all of them."""
    rows: tuple[int, int] | None = None
    """[start, stop) of that part in canonical (out, in) rows; for experts, rows of each expert's matrix."""
    role: str | None = None
    layer: int | None = None
    """Index of the block it is in; every stack counts from 0."""
    stack: str | None = None
    """`encoder`, `decoder` or `vision` where a model has several, else None."""
    features: int | None = None
    """Width of the residual stream, for `attn`, `ffn`, `cross.attn` and `block`."""
    kind: str = "opaque"
    """linear, embedding, conv, norm, raw, attention or opaque. `attn`, `ffn`, `block` are opaque whatever they are."""
    transposed: bool = False
    """Whether a raw expert tensor is stored (experts, in, out) instead of (experts, out, in)."""
    tied: str | None = None
    """Another module whose weight is this very tensor, if any."""

    @property
    def name(self) -> str:
        """`module`, with `.parameter` and `:part` where there are any."""
        return join(self.module, self.parameter or "") + (f":{self.part}" if self.part else "")

    @property
    def whole(self) -> str:
        """The name without its part."""
        return join(self.module, self.parameter or "")


def select(model: nn.Module, where: str | Sequence[str], *, kinds: Collection[str] | None = None) -> list[Place]:
    """The places of `model` that `where` names, in model order, each once.

    `kinds` limits them to what a method can sit on. Raises one `UserError` that lists every term which matches
    nothing, names only places of other kinds, asks for layers that do not exist, or takes nothing away.
    """
    if kinds is not None and not set(kinds) <= set(KINDS):
        raise ValueError(f"unknown kinds {sorted(set(kinds) - set(KINDS))}; there are {', '.join(KINDS)}")
    return _Selection(_Anatomy(model), None if kinds is None else frozenset(kinds)).run(where)


def places(model: nn.Module) -> list[Place]:
    """Every place that the family table, or the analysis of shapes, knows of; parts beside their wholes."""
    return list(_Anatomy(model).places)


def layers(model: nn.Module) -> int:
    """Number of blocks, over all stacks."""
    return sum(stacks(model).values())


def stacks(model: nn.Module) -> dict[str | None, int]:
    """Number of blocks of each stack; a model with one stack has it under None."""
    return dict(_Anatomy(model).depth)


@dataclass(frozen=True)
class Reading:
    """Where a value passes by that a method reads beside its site's own input."""

    module: str
    entering: bool
    """Whether it is the module's first input, else its first output."""
    rows: tuple[int, int] | None = None
    """The output rows meant, for a part of a fused weight."""


def readings(model: nn.Module, places: Sequence[Place], source: str) -> list[Reading | None]:
    """Where `source` passes by for each place, in its own block; None where the place reads its own input.

    `stream` is the residual stream as the sub-layer of an `attn`, `ffn` or `cross.attn` takes it in, any other source
    the output of that role in the attention that an `o` ends. Other places (a path, a block) read their own input.
    Raises one `UserError` for all places whose source is not known.
    """
    anatomy = _Anatomy(model)
    found: list[Reading | None] = []
    unknown = []
    for place in places:
        block, role = anatomy._block(place.module), place.role or ""
        if source == "stream":
            path = anatomy.enters.get((block, role))
            found.append(None if path is None else Reading(path, True))
            missing = path is None and role in CONTRIBUTIONS
        else:
            wanted, ends = role[:-1] + source, role in ("o", "cross.o")
            there = [one for one in anatomy.places if one.role == wanted and anatomy._block(one.module) == block]
            alone = len(there) == 1 and there[0].parameter is None
            found.append(Reading(there[0].module, False, there[0].rows) if ends and alone else None)
            missing = ends and not alone
        if missing:
            unknown.append(place.name)
    if unknown:
        what = (
            "the residual stream enters the sub-layer of" if source == "stream" else f"the {source} is that belongs to"
        )
        raise UserError(
            f"where {what} {listing(unknown, 3)} is not known of {anatomy.family}",
            fix="name modules by their path, whose own input is read then",
        )
    return found


# ---------------------------------------------------------------- what there is


class _Anatomy:
    """All places of one model, found by its family table, or by a guess where there is none."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(walk(model))
        self.order = {path: index for index, path in enumerate(self.modules)}
        self.kinds = {path: kind(module) for path, module in self.modules.items()}
        for path, module in self.modules.items():
            for name in module._modules:
                if is_raw_projection(module, name):
                    self.kinds[join(path, name)] = "opaque"
        self.blocks: dict[str, tuple[str | None, int]] = {}
        self.roots: dict[str, str] = {}
        self.depth: dict[str | None, int] = {}
        self.family = ""
        self.enters: dict[tuple[str, str], str] = {}
        self._found: dict[tuple[Any, ...], Place] = {}
        self._roles: dict[tuple[str, str | None], Place] = {}
        self._lookup()
        known = regions(model)
        for root, module, family in known:
            self._use(family, root, getattr(module, "config", None), len(known) > 1)
        if not self.depth:
            self._found.clear()
            self._roles.clear()
            self._use(guess(model), "", None, False)
        if known:
            self.family = known[0][2].name
        self._rest()
        self.places = sorted(self._found.values(), key=self._position)

    # -- reading the table

    def _use(self, family: Family, root: str, config: object, several: bool) -> None:
        self.family = self.family or family.name
        inside = [path for path in self.modules if within(path, root)]
        meant = _ends if family.model_types else str.__eq__
        for ending, stack in family.blocks.items():
            for path in inside:
                if not isinstance(self.modules[path], nn.ModuleList | nn.Sequential) or not meant(path, ending):
                    continue
                if stack is None and several:
                    stack = next((name for name in ("encoder", "decoder", "vision") if name in root), None)
                if stack is not None:
                    self.roots[root if several else path.rpartition(".")[0]] = stack
                for name in self.modules[path]._modules:
                    block = self._path(join(path, name))
                    if block in self.blocks:
                        continue
                    self.blocks[block] = (stack, self.depth.get(stack, 0))
                    self.depth[stack] = self.depth.get(stack, 0) + 1
        mine = {block: at for block, at in self.blocks.items() if within(block, root)}
        everything = list(self._everything(inside))
        inner: dict[str, dict[str, None]] = {block: {} for block in mine}
        for path in everything:
            block = self._block(path)
            if block in inner and path != block:
                inner[block][path[len(block) + 1 :]] = None
        for block, (stack, _) in mine.items():
            contents = inner[block]
            for role, patterns in sorted(family.roles.items(), key=lambda item: item[0] in SINGLE):
                matches = [at for at in (_matches(contents, stack, text) for text in paths_of(patterns)) if at]
                if role in SINGLE:
                    matches = matches[:1]
                for target, part in (target for found in matches for target in found):
                    self._put(role, join(block, target), part, family, config)
            self._put("block", block, None, family, config)
            for role, patterns in family.enters.items():
                matches = [at for at in (_matches(contents, stack, text) for text in paths_of(patterns)) if at]
                if matches:
                    self.enters[block, role] = join(block, matches[0][0][0])
            self._put_attention(block)
        for role, patterns in family.outside.items():
            for text in paths_of(patterns):
                wanted, _, part = text.partition(":")
                for path in everything:
                    if meant(path, wanted) and self._block(path) not in mine:
                        self._put(role, path, part or None, family, config)

    def _path(self, path: str) -> str:
        """The first path of a module that is reachable by several (blocks that share their weights)."""
        module: nn.Module | None = self.model
        for name in path.split("."):
            module = None if module is None else module._modules.get(name)
        return path if path in self.order else self._names.get(id(module), path)

    def _lookup(self) -> None:
        self._names = {id(module): path for path, module in self.modules.items()}
        self.aliases: dict[str, list[str]] = {}
        for path, module in self.model.named_modules(remove_duplicate=False):
            first = self._names.get(id(module))
            if first is not None:
                self.aliases.setdefault(first, []).append(path)
        owners: dict[int, list[str]] = {}
        for path, module in self.modules.items():
            weight = raw_parameter(module, "weight")
            if weight is not None and weight.ndim == 2:
                owners.setdefault(id(weight), []).append(path)
        self.ties = {path: [other for other in group if other != path] for group in owners.values() for path in group}

    def _everything(self, paths: Iterable[str]) -> Iterator[str]:
        """Paths of modules and of their own parameters."""
        for path in paths:
            if path:
                yield path
            for name in parameter_names(self.modules[path]):
                yield join(path, name)

    def _put(self, role: str, path: str, part: str | None, family: Family, config: object) -> None:
        hidden = role in SINGLE or role == "block"
        if path in self.modules:
            module, parameter = path, None
            site = "opaque" if hidden else self.kinds[path]
            features = self._width(path) if hidden else None
            if site == "opaque" and not hidden:
                return
        else:
            module, _, parameter = path.rpartition(".")
            site, features = "raw", None
        transposed = any(_ends(path, ending) for ending in family.transposed)
        whole = Place(
            module,
            parameter,
            role=None if part else role,
            kind=site,
            features=features,
            transposed=transposed,
            tied=next(iter(self.ties.get(module, [])), None) if parameter is None and not hidden else None,
            **self._where(module),
        )
        ranges = {} if hidden else self._parts(whole, family, config)
        if part is None:
            self._add(whole)
        elif part in ranges:
            self._add(replace(whole, part=part, rows=ranges[part], role=role))

    def _put_attention(self, block: str) -> None:
        """The innermost module around q, k and v of a block, where they are modules, or parts of one."""
        parts = [self._roles.get((block, role)) for role in ("q", "k", "v")]
        if any(place is None or place.kind != "linear" for place in parts):
            return
        inside = [place.module.split(".")[:-1] for place in parts if place is not None]
        same = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*inside, strict=False))
        path = ".".join(names[0] for names in same)
        size = widths(self.modules[parts[1].module]) if parts[1] is not None else None
        if within(path, block) and path != block and size is not None:
            self._add(Place(path, role="attention", kind="attention", features=size[1], **self._where(path)))

    def _add(self, place: Place) -> None:
        hidden = place.role if place.kind == "opaque" else None
        key = (place.name, hidden)
        old = self._found.get(key)
        if old is None or (old.role is None and place.role is not None):
            self._found[key] = place
            self._roles.setdefault((self._block(place.module), place.role), place)

    def _parts(self, whole: Place, family: Family, config: object) -> dict[str, tuple[int, int]]:
        """Row ranges of the parts of a fused weight; none where the rows do not divide as the table says."""
        shares = next((shares for ending, shares in family.fused.items() if _ends(whole.name, ending)), None)
        rows = self._rows(whole)
        if shares is None or rows is None:
            return {}
        numbers = [share if isinstance(share, int) else getattr(config, share, 0) for share in shares.values()]
        total = sum(numbers)
        if not total or rows % total:
            return {}
        ranges, start = {}, 0
        for name, number in zip(shares, numbers, strict=True):
            stop = start + rows // total * number
            ranges[name] = (start, stop)
            start = stop
        return ranges

    def _rows(self, place: Place) -> int | None:
        module = self.modules[place.module]
        if place.parameter is None:
            size = widths(module)
            return None if size is None else size[0]
        tensor = raw_parameter(module, place.parameter)
        if tensor is None:
            return None
        return tensor.shape[-1] if place.transposed else tensor.shape[-2]

    def _where(self, module: str) -> dict[str, Any]:
        inside = self._block(module)
        if inside in self.blocks:
            stack, layer = self.blocks[inside]
            return {"layer": layer, "stack": stack}
        root = next((root for root in self._ancestors(module) if root in self.roots), None)
        return {"layer": None, "stack": None if root is None else self.roots[root]}

    @staticmethod
    def _ancestors(path: str) -> Iterator[str]:
        while path:
            yield path
            path = path.rpartition(".")[0]

    def _block(self, path: str) -> str:
        """The block that a path is or is in, else ""."""
        return next((block for block in self._ancestors(path) if block in self.blocks), "")

    def _width(self, path: str) -> int | None:
        """Width of the residual stream: of what the module returns, or of what its block's projections return."""
        own = widths(self.modules[path]) if self.kinds[path] == "linear" else None
        if own is not None:
            return own[0]
        block = self._block(path)
        for role in ("o", "down", "cross.o"):
            place = self._roles.get((block, role))
            if place is not None:
                return self._rows(place)
        norms = [self.modules[inner] for inner in self.modules if within(inner, block) and self.kinds[inner] == "norm"]
        sizes = {weight.shape[0] for norm in norms if (weight := raw_parameter(norm, "weight")) is not None}
        return sizes.pop() if len(sizes) == 1 else None

    # -- what no table says

    def _rest(self) -> None:
        """Norms, the head, and every other module with a weight."""
        for path in self.modules:
            if self.kinds[path] == "norm":
                self._add(self._plain(path, "norm"))
        for path in self._heads():
            self._add(self._plain(path, "head"))
        for path in self.modules:
            if self.kinds[path] != "opaque":
                self._add(self._plain(path, None))

    def _plain(self, path: str, role: str | None) -> Place:
        tied = next(iter(self.ties.get(path, [])), None)
        return Place(path, role=role, kind=self.kinds[path], tied=tied, **self._where(path))

    def _heads(self) -> list[str]:
        """The output layer: what the model says; else all linears beside its base model; else by width or name."""
        linears = [path for path in self.modules if self.kinds[path] == "linear"]
        owner = next((path for path in self.modules if _answers(self.modules[path], "get_output_embeddings")), None)
        if owner is not None:
            head = _output_embeddings(self.modules[owner])
            if head is not None and self._names.get(id(head)) in linears:
                return [self._names[id(head)]]
            base = getattr(self.modules[owner], "base_model", None)
            root = self._names.get(id(base), owner)
            if root != owner:
                return [path for path in linears if within(path, owner) and not within(path, root)]
            linears = [path for path in linears if not within(path, owner)]
        loose = [path for path in linears if not any(within(path, block) for block in self.blocks)]
        if not loose:
            return []
        sizes = self._output_sizes()
        by_width = [path for path in loose if (widths(self.modules[path]) or (0,))[0] in sizes]
        if by_width:
            return by_width[-1:]
        named = HEADS.search(loose[-1]) is not None and loose[-1] == linears[-1]
        return loose[-1:] if named else []

    def _output_sizes(self) -> set[int]:
        """How wide an output layer would be: as many labels or tokens as the model, its config or its embedding has."""
        sources = [self.model, getattr(self.model, "config", None)]
        names = ("vocab_size", "num_labels", "num_classes")
        found = [getattr(source, name, None) for source in sources for name in names]
        embeds = [self.modules[place.module] for place in self._found.values() if place.role == "embed"]
        found += [getattr(module, "num_embeddings", None) for module in embeds]
        return {size for size in found if isinstance(size, int)}

    def _position(self, place: Place) -> tuple[int, int, int, int]:
        parameters = parameter_names(self.modules[place.module])
        parameter = parameters.index(place.parameter) + 1 if place.parameter in parameters else 0
        return self.order[place.module], parameter, place.kind == "opaque", (place.rows or (-1,))[0]


HEADS = re.compile(r"(^|\.)(heads?|lm_head|classifier|score|fc|logits|unembed|generator)(\.\d+|\.\w*head)?$")


def _ends(path: str, ending: str) -> bool:
    return path == ending or path.endswith("." + ending)


def _matches(contents: Collection[str], stack: str | None, text: str) -> list[tuple[str, str | None]]:
    limit, slash, rest = text.rpartition("/")
    if slash and limit != stack:
        return []
    wanted, _, part = rest.partition(":")
    if "*" in wanted:
        return [(path, part or None) for path in contents if fnmatch.fnmatchcase(path, wanted)]
    return [(wanted, part or None)] if wanted in contents else []


def _answers(module: nn.Module, method: str) -> bool:
    return callable(getattr(module, method, None))


def _output_embeddings(module: nn.Module) -> nn.Module | None:
    try:
        head = module.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) else None


# ---------------------------------------------------------------- what is asked for


@dataclass(frozen=True)
class _Term:
    text: str
    negative: bool
    stack: str | None
    body: str
    part: str | None
    range: slice | int | None


TERM = re.compile(r"(?P<no>!?)\s*(?:(?P<stack>\w+)/)?(?P<body>[^@:/!\s]+)(?::(?P<part>\w+))?(?:@(?P<range>[-\d:]+))?")


class _Miss(Exception):
    """A term that comes to nothing; the message says why."""


class _Selection:
    """One `where` on one model."""

    def __init__(self, anatomy: _Anatomy, kinds: frozenset[str] | None) -> None:
        self.anatomy, self.kinds = anatomy, kinds
        self.places = anatomy.places
        self.roles = [role for role in ROLES if any(place.role == role for place in self.places)]

    def run(self, where: str | Sequence[str]) -> list[Place]:
        problems: list[str] = []
        chosen: dict[str, Place] = {}
        terms = []
        for text in _split(where):
            try:
                terms.append(_parse(text))
            except _Miss as miss:
                problems.append(str(miss))
        if not terms and not problems:
            raise UserError("where: no term at all, nothing is selected", fix=self._advice())
        for term in terms:
            if not term.negative:
                try:
                    for place in self._supported(term, self._find(term)):
                        chosen.setdefault(place.name, place)
                except _Miss as miss:
                    problems.append(str(miss))
        if not problems and not chosen:
            problems.append("only terms with ! are given, so there is nothing to take away from")
        for term in terms:
            if term.negative:
                try:
                    self._take(term, chosen, bool(problems))
                except _Miss as miss:
                    problems.append(str(miss))
        if not problems and not chosen:
            problems.append(f"{', '.join(_split(where))!r} takes away all that it selects")
        if problems:
            told = problems[0] if len(problems) == 1 else "".join(f"\n  - {problem}" for problem in problems)
            raise UserError(f"where: {told}", fix=self._advice())
        kept = [place for place in chosen.values() if place.part is None or place.whole not in chosen]
        return sorted(kept, key=self.anatomy._position)

    def _take(self, term: _Term, chosen: dict[str, Place], excused: bool) -> None:
        """Take the places of a `!term` out of the chosen ones, splitting a whole that loses a part."""
        unwanted = self._find(term)
        removed = False
        for place in unwanted:
            if place.part is not None and place.whole in chosen:
                del chosen[place.whole]
                for part in self._parts(place.whole):
                    chosen[part.name] = part
            targets = [place.name]
            if place.part is None and place.kind != "opaque":
                targets += [part.name for part in self._parts(place.name)]
            for name in targets:
                removed |= chosen.pop(name, None) is not None
        if not removed and not excused:
            names = listing((place.name for place in unwanted), 3)
            raise _Miss(f'"{term.text}" takes nothing away: none of {names} is selected')

    def _parts(self, whole: str) -> list[Place]:
        return [place for place in self.places if place.part is not None and place.whole == whole]

    # -- one term

    def _find(self, term: _Term) -> list[Place]:
        """All places a term means, of whatever kind; a `_Miss` says why there are none."""
        found = self._bodied(term)
        if term.part is not None:
            found = self._sliced(term, found)
        if term.stack is not None:
            found = self._stacked(term, found)
        if term.range is not None:
            found = self._ranged(term, found)
        return found

    def _bodied(self, term: _Term) -> list[Place]:
        body, whole = term.body, [place for place in self.places if place.part is None]
        if body == "all-linear":
            found = [place for place in whole if self._is_plain_linear(place)]
        elif body == "all":
            found = [place for place in whole if place.kind not in WEIGHTLESS and not self._is_tied_head(place)]
        elif body in ROLES:
            found = [place for place in self.places if place.role == body]
            if not found and body in TOGETHER:
                found = [place for place in self.places if place.role in TOGETHER[body]]
            if not found:
                raise _Miss(self._no_role(term))
        else:
            found = self._by_path(body, whole)
        if not found and body == "all-linear":
            raise _Miss(f'"{term.text}" matched 0 of {self._census()}: the output head is left out')
        if not found:
            raise _Miss(f'"{term.text}" matched 0 of {self._census()}{self._nearest(body)}')
        return found

    def _is_plain_linear(self, place: Place) -> bool:
        if place.role == "head" or self._is_tied_head(place):
            return False
        if place.kind == "raw":
            return isinstance(self._owner(place), nn.MultiheadAttention)
        return place.kind == "linear"

    def _owner(self, place: Place) -> nn.Module:
        """The module that reads a raw parameter."""
        module = self.anatomy.modules[place.module]
        parent = self.anatomy.modules.get(place.module.rpartition(".")[0], module)
        return parent if is_raw_projection(parent, place.module.rpartition(".")[2]) else module

    def _is_tied_head(self, place: Place) -> bool:
        return place.kind == "linear" and any(
            self.anatomy.kinds[other] == "embedding" for other in self.anatomy.ties.get(place.module, [])
        )

    def _by_path(self, body: str, whole: list[Place]) -> list[Place]:
        """Places with a weight; else sub-layers and blocks; else any module; else attentions. `kinds` chooses."""
        match = _globbed(body) if any(sign in body for sign in "*?[") else _suffixed(body)

        def named(place: Place) -> bool:
            paths = self.anatomy.aliases.get(place.module, [place.module])
            return any(match(join(path, place.parameter or "")) for path in paths)

        weighted = [place for place in whole if place.kind not in WEIGHTLESS and named(place)]
        hidden = [place for place in whole if place.kind == "opaque" and named(place)]
        taken = {place.module for place in weighted + hidden if place.parameter is None}
        other = [
            Place(path, **self.anatomy._where(path))
            for path in self.anatomy.modules
            if path and path not in taken and named(Place(path))
        ]
        attentions = [place for place in whole if place.kind == "attention" and named(place)]
        tiers = [tier for tier in (weighted, hidden, other, attentions) if tier]
        fitting = [tier for tier in tiers if self.kinds is None or any(place.kind in self.kinds for place in tier)]
        return next(iter(fitting or tiers), [])

    def _sliced(self, term: _Term, found: list[Place]) -> list[Place]:
        parts = [part for place in found for part in self._parts(place.whole)]
        cut = [part for part in parts if part.part == term.part]
        if cut:
            return cut
        first = found[0].name
        if parts:
            names = ", ".join(dict.fromkeys(str(part.part) for part in parts))
            raise _Miss(f'"{term.text}": {first} has the parts {names}, no {term.part}')
        inner = TOGETHER.get(found[0].role or "", ())
        why = f" (its rows interleave {', '.join(inner)}, so only the whole can be chosen)" if inner else ""
        raise _Miss(f'"{term.text}": {first} has no parts{why}')

    def _stacked(self, term: _Term, found: list[Place]) -> list[Place]:
        kept = [place for place in found if place.stack == term.stack]
        if kept:
            return kept
        names = sorted({place.stack for place in self.places if place.stack is not None})
        if term.stack in names:
            raise _Miss(f'"{term.text}": {term.body} is not in the {term.stack}')
        told = f"has the stacks {', '.join(names)}" if names else "is one stack"
        raise _Miss(f'"{term.text}": this model {told}, no {term.stack}')

    def _ranged(self, term: _Term, found: list[Place]) -> list[Place]:
        depth = self.anatomy.depth
        if not depth:
            raise _Miss(f'"{term.text}": no list of blocks was found in this model, so it has no layers to count')
        wanted: dict[str | None, set[int]] = {}
        for stack, count in depth.items():
            if isinstance(term.range, slice):
                wanted[stack] = set(range(count)[term.range])
            elif term.range is not None and -count <= term.range < count:
                wanted[stack] = {term.range % count}
        kept = [place for place in found if place.layer is not None and place.layer in wanted.get(place.stack, set())]
        if kept:
            return kept
        inside = sorted({place.layer for place in found if place.layer is not None})
        if not inside:
            raise _Miss(f'"{term.text}": {found[0].name} is outside the blocks, so it has no layer')
        here = {place.stack for place in found if place.layer is not None}
        if not any(wanted.get(stack) for stack in here):
            told = " and ".join(
                f"{f'the {stack}' if stack else 'this model'} has {count} layers (0 to {count - 1})"
                for stack, count in depth.items()
                if stack in here
            )
            raise _Miss(f'"{term.text}": {told}')
        raise _Miss(f'"{term.text}": {term.body} is only in layers {listing(map(str, inside))}')

    def _supported(self, term: _Term, found: list[Place]) -> list[Place]:
        """Those of a kind the method can sit on."""
        kept = found if self.kinds is None else [place for place in found if place.kind in self.kinds]
        if kept:
            return kept
        there = _several(PLURALS[name] for name in KINDS if any(place.kind == name for place in found))
        able = _several(PLURALS[name] for name in KINDS if name in (self.kinds or ()))
        names = listing(dict.fromkeys(place.name for place in found), 2)
        raise _Miss(f'"{term.text}" names only {there} ({names}), and the method sits on {able}{self._instead(term)}')

    # -- what to say

    def _no_role(self, term: _Term) -> str:
        told = f'"{term.text}": {self.anatomy.family} has no {term.body}'
        fused = next((name for name, parts in TOGETHER.items() if term.body in parts and name in self.roles), None)
        if fused is not None:
            return f"{told} of its own: only the fused {fused}, whose rows interleave its parts"
        twin = f"expert_{term.body}"
        if twin in self.roles:
            return f"{told}; its experts have {twin}"
        path = next((path for path in self.anatomy.modules if _ends(path, term.body)), None)
        aside = f"; a module called {path} is meant by *.{term.body}" if path else ""
        return f"{told}; its roles are {', '.join(self.roles) or 'none'}{aside}"

    def _instead(self, term: _Term) -> str:
        """For a sub-layer's output named to a method that needs weights: the projections of that sub-layer."""
        offers = {"attn": ("q", "k", "v", "o"), "ffn": ("gate", "up", "down"), "cross.attn": ("cross.q", "cross.v")}
        able = [role for role in offers.get(term.body, ()) if role in self.roles]
        return f"; the projections are {', '.join(able)}" if able and "linear" in (self.kinds or ()) else ""

    def _census(self) -> str:
        """How many candidates there were, by kind: `226 linears`."""
        wanted = [name for name in KINDS if name in (self.kinds or ("linear",))]
        counts = {
            name: len({place.name for place in self.places if place.kind == name and place.part is None})
            for name in wanted
        }
        return _several(f"{count} {PLURALS[name]}" for name, count in counts.items() if count or len(wanted) == 1)

    def _nearest(self, body: str) -> str:
        """Roles and ends of paths that look like the word."""
        clean = re.sub(r"^(\*\.)+|(\.\*)+$", "", body)
        length = clean.count(".") + 1
        ends = {".".join(path.split(".")[-length:]) for path in self.anatomy.modules if path}
        ends |= {place.parameter for place in self.places if place.parameter is not None}
        words = [*self.roles, "all-linear", *sorted(ends)]
        close = nearest(clean, words)
        return f"; nearest: {', '.join(close)}" if close else ""

    def _advice(self) -> str:
        """What can be written for this model."""
        has = f"its roles are {', '.join(self.roles)}" if self.roles else "it has no roles"
        return f"name all-linear, a role, the end of a path, or a glob; {self.anatomy.family}: {has}"


def _split(where: str | Sequence[str]) -> list[str]:
    texts = [where] if isinstance(where, str) else list(where)
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong:
        raise UserError(f"where: {listing(map(repr, wrong), 3)} is not text", fix='write terms like "q, v@8:"')
    return [term.strip() for text in texts for term in text.split(",") if term.strip()]


def _parse(text: str) -> _Term:
    match = TERM.fullmatch(text)
    if match is None:
        raise _Miss(f'"{text}" is not a term: [!][stack/]name[:part][@range] is the form')
    number = match["range"]
    try:
        bounds = None if number is None else [int(piece) if piece else None for piece in number.split(":")]
        if bounds is not None and (len(bounds) > 3 or (len(bounds) == 3 and bounds[2] == 0)):
            raise ValueError
    except ValueError:
        raise _Miss(f'"{text}": @{number} is not a range of layers; write @3, @8:, @-4:, @0:6 or @::2') from None
    layer: slice | int | None = None
    if bounds is not None:
        layer = bounds[0] if len(bounds) == 1 else slice(*bounds)
    return _Term(text, bool(match["no"]), match["stack"], match["body"], match["part"], layer)


def _suffixed(body: str) -> Callable[[str], bool]:
    return lambda path: _ends(path, body)


def _globbed(body: str) -> Callable[[str], bool]:
    """A glob on the path, or on an end of it that begins at a dot."""
    return lambda path: fnmatch.fnmatchcase(path, body) or fnmatch.fnmatchcase(path, f"*.{body}")


def _several(words: Iterable[str]) -> str:
    *most, last = list(words) or ["nothing"]
    return f"{', '.join(most)} and {last}" if most else last
