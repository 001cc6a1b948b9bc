"""Rows of one batch with different adapters, as grouped matrix products instead of a loop over the adapters.

A method may say that what it adds to an output is a product of two factors (`Method.added`): y = base(x) + (x Aᵀ)Bᵀ.
The factors of all adapters in use are then stacked, padded with zeros to the largest rank, and two batched products
serve all rows: (groups, tokens, in)(groups, in, rank) and (groups, tokens, rank)(groups, rank, out). Rows are sorted by
what they use; a group with fewer rows than the largest is filled up with a row of its own whose result is dropped.

Stacks of tensors that ask for no gradient are kept from one forward to the next and cost as much memory as the factors
in use; an adapter that joins takes the place of one that left, in place. A tensor that was changed (its version or its
storage is another) is stacked again. Methods without factors, and factors that are sharded, hooked or of another type
than the input, keep the loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.delta import Delta
from trimtab.core.frozen import frozen_weight
from trimtab.core.site import Base, LinearBase
from trimtab.core.state import State

Names = tuple[str, ...]
RowGroup = tuple[Names, list[int]]
Stamp = tuple[tuple[int, int, int], ...]
"""Of every tensor: which one it is, its version, where its values are."""
SPARE = 4
"""Stacks with more than so many times the places in use are made anew, so that memory comes back."""


@dataclass(frozen=True)
class Layout:
    """How the rows of some groups stand side by side."""

    groups: int
    order: Tensor
    """(groups * most): row numbers, group by group, each filled up to the largest."""
    real: Tensor | None
    """Which places of `order` are rows and not filling; None where all are."""
    rows: Tensor
    """The row numbers without filling."""
    whole: bool
    """Whether `order` counts up from 0 through all rows: nothing has to be moved."""


def layout(groups: Sequence[RowGroup], size: int, device: torch.device) -> Layout:
    """The layout of these groups of a batch of `size` rows."""
    most = max(len(rows) for _, rows in groups)
    order = [row for _, rows in groups for row in (*rows, *rows[:1] * (most - len(rows)))]
    real = [at for at in range(len(order)) if at % most < len(groups[at // most][1])]
    return Layout(
        len(groups),
        torch.tensor(order, device=device),
        torch.tensor(real, device=device) if len(real) < len(order) else None,
        torch.tensor([order[at] for at in real], device=device),
        order == list(range(size)),
    )


@dataclass
class Stacks:
    """The stacked factors of the adapters in use at one module: those of `held[i]` are at place i."""

    held: list[Names | None] = field(default_factory=list)
    stamps: dict[Names, Stamp] = field(default_factory=dict)
    A: Tensor | None = None  # (places, rank, in)
    B: Tensor | None = None  # (places, out, rank)

    def hold(self, wanted: dict[Names, Stamp], factors: dict[Names, tuple[Tensor, Tensor]]) -> None:
        """Make `wanted` the adapters of the first places; `factors` are those of all that are not there yet."""
        rank = max([A.shape[0] for _, A in factors.values()], default=0)
        old = {names: at for at, names in enumerate(self.held) if names is not None and names not in factors}
        if self.A is None or self.B is None or not self.fits(len(wanted), rank):
            B, A = next(iter(factors.values()), (self.B, self.A))
            rank = max(rank, self.A.shape[1] if old and self.A is not None else 0)
            new_A = A.new_zeros(len(wanted), rank, A.shape[-1])  # type: ignore[union-attr]
            new_B = B.new_zeros(len(wanted), B.shape[-2], rank)  # type: ignore[union-attr]
            self.held, kept = [None] * len(wanted), [names for names in wanted if names in old]
            for at, names in enumerate(kept):
                self.held[at] = names
                self.write(new_A, new_B, at, self.B[old[names]], self.A[old[names]])  # type: ignore[index]
            self.A, self.B = new_A, new_B
        else:
            self.held = [names if names in wanted and names not in factors else None for names in self.held]
        for names, (B, A) in factors.items():
            at = self.held.index(None)
            self.held[at] = names
            self.write(self.A, self.B, at, B, A)
        for at in range(len(wanted), len(self.held)):
            if self.held[at] is not None:
                hole = self.held.index(None)
                self.held[hole], self.held[at] = self.held[at], None
                self.write(self.A, self.B, hole, self.B[at], self.A[at])
        self.stamps = wanted

    def fits(self, count: int, rank: int) -> bool:
        """Whether so many adapters of this rank have a place, without many places to spare."""
        assert self.A is not None
        places, most = self.A.shape[:2]
        return count <= places <= SPARE * count and rank <= most

    @staticmethod
    def write(all_A: Tensor, all_B: Tensor, at: int, B: Tensor, A: Tensor) -> None:
        """One pair of factors into its place, with zeros up to the largest rank."""
        rank = A.shape[0]
        all_A[at, :rank], all_B[at, :, :rank] = A, B
        all_A[at, rank:], all_B[at, :, rank:] = 0, 0


def grouped(
    key: int,
    state: State,
    used: Mapping[Names, list[Delta]],
    x: Tensor,
    y: Tensor,
    base: Base,
    groups: Sequence[RowGroup],
) -> tuple[Tensor, set[Names]]:
    """The frozen output `y` with what all groups add whose additions are products; and which groups these are.

    `used` are the deltas of each group at this module, `key` is what tells the module from others.
    """
    if len(groups) < 2 or not isinstance(base, LinearBase) or x.ndim < 2 or x.dtype != y.dtype or refused(x):
        return y, set()
    used = {names: found for names, found in used.items() if found and all(map(stackable, found))}
    if len(used) < 2:
        return y, set()
    graph = torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(map(asks, used.values())))
    stacks = fresh(used, x, base) if graph else kept(key, state, used, x, base)
    if stacks is None:
        return y, set()
    names, A, B = stacks
    place = laid_out(state, names, groups, x.shape[0], x.device, keep=not graph)
    in_place = not torch.is_grad_enabled() and frozen_weight(base, x) is not None
    return added(x, y, A, B, place, in_place), set(names)


def added(x: Tensor, y: Tensor, A: Tensor, B: Tensor, place: Layout, in_place: bool) -> Tensor:
    """y + (x Aᵀ)Bᵀ, row by row with the factors of the row's group."""
    moved = x if place.whole else x.index_select(0, place.order)
    h = torch.bmm(moved.reshape(place.groups, -1, x.shape[-1]), A.mT)  # (groups, tokens, rank)
    if place.whole:
        flat = y.view(place.groups, -1, y.shape[-1]) if in_place else y.reshape(place.groups, -1, y.shape[-1])
        return (flat.baddbmm_ if in_place else flat.baddbmm)(h, B.mT).view(y.shape)
    add = torch.bmm(h, B.mT).reshape(len(place.order), *y.shape[1:])
    add = add if place.real is None else add.index_select(0, place.real)
    return y.index_add_(0, place.rows, add) if in_place else y.index_add(0, place.rows, add)


def refused(x: Tensor) -> bool:
    """Whether something else than plain tensors in eager or compiled mode runs."""
    return (
        type(x) not in (Tensor, nn.Parameter)
        or torch._C._are_functorch_transforms_active()
        or (not x.is_meta and torch.is_autocast_enabled(x.device.type))
    )


def stackable(delta: Delta) -> bool:
    """Whether a delta's tensors may be read from outside its call: no hook is on it, and none of them is sharded."""
    hooked = delta._forward_hooks or delta._forward_pre_hooks
    return not hooked and all(type(one) in (Tensor, nn.Parameter) for one in tensors(delta))


def tensors(delta: Delta) -> list[Tensor]:
    """All that a delta's factors are made of."""
    shared = delta.__dict__.get("shared")
    if not delta._modules and shared is None:
        return [one for one in (*delta._parameters.values(), *delta._buffers.values()) if one is not None]
    groups = [delta] if shared is None else [delta, shared]
    return [one for group in groups for one in (*group.parameters(), *group.buffers())]


def asks(found: Sequence[Delta]) -> bool:
    """Whether any tensor of these deltas asks for a gradient."""
    return any(one.requires_grad for delta in found for one in tensors(delta))


def factors_of(found: Sequence[Delta], x: Tensor, base: Base) -> tuple[Tensor, Tensor] | None:
    """B (out, rank) and A (rank, in) of deltas stacked on one module: their ranks add up. None where one has none."""
    pairs = []
    out, width = base.shape
    for delta in found:
        mine = out if delta.rows is None else len(delta.rows)
        pair = delta.method.added(delta.at(x.dtype), (mine, width))
        if pair is None or pair[0].dtype != x.dtype or pair[1].dtype != x.dtype:
            return None
        B, A = pair
        pairs.append((B if delta.rows is None else delta.rows.among(B, out, 0), A))
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([B for B, _ in pairs], 1), torch.cat([A for _, A in pairs])


def fresh(used: dict[Names, list[Delta]], x: Tensor, base: Base) -> tuple[tuple[Names, ...], Tensor, Tensor] | None:
    """Stacks of this forward alone, through which gradients flow."""
    pairs = {names: pair for names, found in used.items() if (pair := factors_of(found, x, base)) is not None}
    if len(pairs) < 2:
        return None
    rank = max(A.shape[0] for _, A in pairs.values())
    A = torch.stack([nn.functional.pad(A, (0, 0, 0, rank - len(A))) for _, A in pairs.values()])
    B = torch.stack([nn.functional.pad(B, (0, rank - B.shape[1])) for B, _ in pairs.values()])
    return tuple(pairs), A, B


def kept(
    key: int, state: State, used: dict[Names, list[Delta]], x: Tensor, base: Base
) -> tuple[tuple[Names, ...], Tensor, Tensor] | None:
    """Stacks that stay for the next forward, brought up to date."""
    memory = state.kept
    stacks = memory.setdefault(key, Stacks())
    if stacks.A is not None and (stacks.A.dtype, stacks.A.device) != (x.dtype, x.device):
        stacks = memory[key] = Stacks()
    wanted = {
        names: tuple(map(stamp, (one for delta in found for one in tensors(delta)))) for names, found in used.items()
    }
    without = memory.setdefault("without", {})  # what was found to have no factors, as long as it is unchanged
    wanted = {names: marks for names, marks in wanted.items() if without.get((key, names)) != marks}
    if stacks.stamps != wanted:
        with torch.no_grad():
            news = {
                names: factors_of(used[names], x, base)
                for names, marks in wanted.items()
                if stacks.stamps.get(names) != marks
            }
        without |= {(key, names): wanted.pop(names) for names, pair in news.items() if pair is None}
        if len(wanted) < 2:
            return None
        with torch.no_grad():
            stacks.hold(wanted, {names: pair for names, pair in news.items() if pair is not None})
    elif len(wanted) < 2:
        return None
    count = len(wanted)
    assert stacks.A is not None
    assert stacks.B is not None
    return tuple(stacks.held[:count]), stacks.A[:count], stacks.B[:count]


def stamp(one: Tensor) -> tuple[int, int, int]:
    """What changes when a tensor is replaced or written to."""
    return id(one), -1 if one.is_inference() else one._version, one.data_ptr()


def laid_out(
    state: State, names: tuple[Names, ...], groups: Sequence[RowGroup], size: int, device: torch.device, *, keep: bool
) -> Layout:
    """The layout of the groups `names`, in this order; kept as long as the rows stay as they are."""
    rows = dict(groups)
    if not keep:
        return layout([(one, rows[one]) for one in names], size, device)
    known: Any = state.kept.get("layouts")
    if known is None or known[0] is not state.rows:
        known = state.kept["layouts"] = (state.rows, {})
    key = (names, size, device)
    if key not in known[1]:
        known[1][key] = layout([(one, rows[one]) for one in names], size, device)
    return known[1][key]
