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
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from trimtab.core.errors import UserError, listing, nearest
from trimtab.core.modules import is_raw_projection, join
from trimtab.core.places import Anatomy, Place, ends_in

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


def select(model: nn.Module, where: str | Sequence[str], *, kinds: Collection[str] | None = None) -> list[Place]:
    """The places of `model` that `where` names, in model order, each once.

    `kinds` limits them to what a method can sit on. Raises one `UserError` that lists every term which matches
    nothing, names only places of other kinds, asks for layers that do not exist, or takes nothing away.
    """
    if kinds is not None and not set(kinds) <= set(KINDS):
        raise ValueError(f"unknown kinds {sorted(set(kinds) - set(KINDS))}; there are {', '.join(KINDS)}")
    return _Selection(Anatomy(model), None if kinds is None else frozenset(kinds)).run(where)


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

    def __init__(self, anatomy: Anatomy, kinds: frozenset[str] | None) -> None:
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
        path = next((path for path in self.anatomy.modules if ends_in(path, term.body)), None)
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
    return lambda path: ends_in(path, body)


def _globbed(body: str) -> Callable[[str], bool]:
    """A glob on the path, or on an end of it that begins at a dot."""
    return lambda path: fnmatch.fnmatchcase(path, body) or fnmatch.fnmatchcase(path, f"*.{body}")


def _several(words: Iterable[str]) -> str:
    *most, last = list(words) or ["nothing"]
    return f"{', '.join(most)} and {last}" if most else last
