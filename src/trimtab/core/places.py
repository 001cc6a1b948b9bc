"""Places: where in a model a method can be put, found by its family's table or by the shapes of its modules."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from trimtab.core.errors import UserError, listing
from trimtab.core.family import CONTRIBUTIONS, SINGLE, Family, paths_of, regions
from trimtab.core.guess import guess
from trimtab.core.modules import is_raw_projection, join, kind, parameter_names, raw_parameter, walk, widths, within
from trimtab.core.rows import Rows

HEADS = re.compile(r"(^|\.)(heads?|lm_head|classifier|score|fc|logits|unembed|generator)(\.\d+|\.\w*head)?$")


@dataclass(frozen=True)
class Place:
    """Somewhere in a model a method can be put: a module, a raw parameter of one, or some of their output rows."""

    module: str
    """Dotted path of the module from the root model; "" is the root."""
    parameter: str | None = None
    """A raw parameter of that module, which is read and never called (`in_proj_weight`); None = the module itself."""
    part: str | None = None
    """Name of some of its output rows (`q` of a fused qkv); None = all of them."""
    rows: Rows | None = None
    """That part in canonical (out, in) rows; for experts, rows of each expert's matrix."""
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


def places(model: nn.Module) -> list[Place]:
    """Every place that the family table, or the analysis of shapes, knows of; parts beside their wholes."""
    return list(Anatomy(model).places)


def layers(model: nn.Module) -> int:
    """Number of blocks, over all stacks."""
    return sum(stacks(model).values())


def stacks(model: nn.Module) -> dict[str | None, int]:
    """Number of blocks of each stack; a model with one stack has it under None."""
    return dict(Anatomy(model).depth)


@dataclass(frozen=True)
class Reading:
    """Where a value passes by that a method reads beside its site's own input."""

    module: str
    entering: bool
    """Whether it is the module's first input, else its first output."""
    rows: Rows | None = None
    """The output rows meant, for a part of a fused weight."""


def readings(model: nn.Module, places: Sequence[Place], source: str) -> list[Reading | None]:
    """Where `source` passes by for each place, in its own block; None where the place reads its own input.

    `stream` is the residual stream as the sub-layer of an `attn`, `ffn` or `cross.attn` takes it in, any other source
    the output of that role in the attention that an `o` ends. Other places (a path, a block) read their own input.
    Raises one `UserError` for all places whose source is not known.
    """
    anatomy = Anatomy(model)
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


class Anatomy:
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
        meant = ends_in if family.model_types else str.__eq__
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
        transposed = any(ends_in(path, ending) for ending in family.transposed)
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

    def _parts(self, whole: Place, family: Family, config: object) -> dict[str, Rows]:
        """Rows of the parts of a fused weight; none where the rows do not divide as the table says."""
        rows = self._rows(whole)
        if rows is None:
            return {}
        if any(ends_in(whole.name, ending) for ending in family.by_head):
            return by_head(rows, config)
        shares = next((shares for ending, shares in family.fused.items() if ends_in(whole.name, ending)), {})
        return _in_order(
            {name: share if isinstance(share, int) else getattr(config, share, 0) for name, share in shares.items()},
            rows,
        )

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
        first = -1 if place.rows is None else place.rows.start
        return self.order[place.module], parameter, place.kind == "opaque", first


def _in_order(shares: Mapping[str, int], rows: int, groups: int = 1) -> dict[str, Rows]:
    """Parts one after another in each of `groups` runs; none where the rows do not divide by their shares."""
    total = sum(shares.values()) * groups
    if not total or rows % total:
        return {}
    found, start = {}, 0
    for name, share in shares.items():
        stop = start + rows // total * share
        found[name] = Rows(start, stop, groups)
        start = stop
    return found


def by_head(rows: int, config: object) -> dict[str, Rows]:
    """q, k and v of a weight that has them head by head: for every key head its queries, the key, the value.

    Empty where the rows do not divide into heads as the configuration counts them.
    """
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    size = getattr(config, "head_dim", None) or (int(getattr(config, "hidden_size", 0)) // heads if heads else 0)
    keys, rest = divmod(rows - heads * size, 2 * size) if size else (0, 0)
    if keys < 1 or rest or heads % keys:
        return {}
    return _in_order({"q": heads // keys, "k": 1, "v": 1}, rows, keys)


def ends_in(path: str, ending: str) -> bool:
    """Whether a path is this ending, or ends with it after a dot."""
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
