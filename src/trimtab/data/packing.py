"""Packing: the rows of a step as one sequence without padding, in which what rows have in common stands once.

For a causal model, a `Pack`. Rows that start with the same tokens (system prompt, template, question) share a segment;
their different rests are segments that continue it: a tree of any depth. A causal model computes exactly what it would
for each row alone, as long as attention follows the tree (`trimtab.engine.attention`) and positions count from each
row's start. Methods that edit the ends of a prompt may do so at a token for one row and not for another: such a token
is not shared.

For an encoder with a label per row, a `Bag`: nothing is shared, since every token sees its whole row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from trimtab.core.positions import Ends, marks
from trimtab.data.encoded import Encoded

SHARE = 16
"""Fewest common tokens worth a segment of their own."""

WASTE = 2.0
"""Scores of a padded group of labelled rows at most, over those of its rows alone."""


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of a pack. They attend to every token of their `ancestors`, then causally to each other."""

    start: int
    stop: int
    ancestors: tuple[int, ...] = ()
    """Indices of earlier segments, root first."""


@dataclass(frozen=True)
class Pack:
    """Rows as one sequence: `ids`, `positions` and `prompts` (1, tokens), and the terms of the loss.

    `prompts` has the length of the prompt of each token's row: of any of its rows, where a token is shared.

    Term i is the prediction of `targets[i]` at token `sources[i]`, and counts `weights[i]` times: a token may have to
    predict several continuations, and a shared one counts once for each row that has it.
    """

    ids: Tensor
    positions: Tensor
    prompts: Tensor
    segments: tuple[Segment, ...]
    sources: Tensor
    targets: Tensor
    weights: Tensor
    rows: int
    row_tokens: int
    """Tokens of all rows before sharing."""
    owners: Tensor
    """(1, tokens): the row of each token, or one of its rows."""
    ends: tuple[Ends, ...] = ()
    """The ends of prompts at which no two rows share a token that one of them has edited and the other not."""
    hidden: Tensor | None = None
    """(1, tokens, width): what a frozen bottom makes of the tokens (`trimtab.engine.bottom`)."""

    @property
    def terms(self) -> int:
        """Trained tokens of all rows."""
        return int(self.weights.sum())

    def to(self, device: torch.device) -> Pack:
        """The same pack with its tensors on a device."""
        moved = {key: value.to(device) for key, value in vars(self).items() if isinstance(value, Tensor)}
        return Pack(**{**vars(self), **moved})


@dataclass(frozen=True)
class Rows:
    """Neighbouring rows of a bag, of like length: its tokens from `start` to `stop`.

    `places` (rows, longest) says where each row's tokens are among them, where `real` (rows, longest) is true, and
    `back` (tokens,) where each token stands in the flattened `places`.
    """

    start: int
    stop: int
    places: Tensor
    real: Tensor
    back: Tensor


@dataclass(frozen=True)
class Bag:
    """Labelled rows as one sequence: `ids`, `positions` and `types` (1, tokens).

    The rows stand shortest first; `first` and `labels` (rows,) are in the order they were given, the first token of
    each row and its label.
    """

    ids: Tensor
    positions: Tensor
    types: Tensor | None
    first: Tensor
    labels: Tensor
    groups: tuple[Rows, ...]
    hidden: Tensor | None = None
    """What a frozen bottom makes of the tokens, (1, tokens, width) or, past the seam, (rows, 1, width)."""

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(self.labels)

    @property
    def terms(self) -> int:
        """Rows."""
        return self.rows

    def to(self, device: torch.device) -> Bag:
        """The same bag with its tensors on a device."""
        if self.ids.device == device:
            return self
        groups = tuple(Rows(one.start, one.stop, *(t.to(device) for t in tensors_of(one))) for one in self.groups)
        moved = {key: value.to(device) for key, value in vars(self).items() if isinstance(value, Tensor)}
        return Bag(**{**vars(self), **moved, "groups": groups})


def tensors_of(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors of a group."""
    return rows.places, rows.real, rows.back


def bag(rows: Sequence[Encoded], first_position: int = 0) -> Bag:
    """Labelled rows end to end; each row's positions count from `first_position`."""
    order = sorted(range(len(rows)), key=lambda row: len(rows[row].ids))
    lengths = torch.tensor([len(rows[row].ids) for row in order])
    ends = lengths.cumsum(0)
    first = torch.empty_like(lengths)
    first[order] = ends - lengths
    kind = torch.float32 if any(isinstance(row.label, float) for row in rows) else torch.int64
    types = [one for row in order for one in (rows[row].types or [0] * len(rows[row].ids))]
    groups, begin = [], 0
    for end in cuts(lengths.tolist()):
        groups.append(group(lengths[begin:end], int(ends[begin] - lengths[begin])))
        begin = end
    return Bag(
        ids=torch.tensor([[token for row in order for token in rows[row].ids]]),
        positions=torch.tensor([[first_position + at for row in order for at in range(len(rows[row].ids))]]),
        types=torch.tensor([types]) if any(row.types is not None for row in rows) else None,
        first=first,
        labels=torch.tensor([row.label for row in rows], dtype=kind),
        groups=tuple(groups),
    )


def cuts(lengths: Sequence[int]) -> list[int]:
    """Where groups of rows end, shortest first: padding at most doubles the scores of a group."""
    found, begin, scores = [], 0, 0
    for at, length in enumerate(lengths):
        if at > begin and length**2 * (at + 1 - begin) > WASTE * (scores + length**2):
            found.append(at)
            begin, scores = at, 0
        scores += length**2
    return [*found, len(lengths)]


def group(lengths: Tensor, start: int) -> Rows:
    """Rows of these lengths, from token `start` of a bag."""
    at, first = torch.arange(int(lengths.max())), lengths.cumsum(0) - lengths
    real = at < lengths[:, None]
    places = torch.where(real, first[:, None] + at, first[:, None])
    return Rows(start, start + int(lengths.sum()), places, real, real.flatten().nonzero().squeeze(1))


def pack(rows: Sequence[Encoded], share: int | None = SHARE, ends: Sequence[Ends] = ()) -> Pack:
    """Pack rows; common beginnings of at least `share` tokens are kept once (None: never).

    `ends` are those of the prompts that attached methods edit: rows part where one is edited and the other is not.
    """
    prompts = [prompt_length(row) for row in rows]
    marked = [marks(len(row.ids), prompt, ends) for row, prompt in zip(rows, prompts, strict=True)] if ends else None
    builder = _Builder([row.ids for row in rows], share, marked)
    terms: Counter[tuple[int, int]] = Counter()
    for row, places in zip(rows, builder.places, strict=True):
        for at in range(1, len(row.ids)):
            if row.trained[at]:
                terms[places[at - 1], row.ids[at]] += 1
    ordered = sorted(terms)
    return Pack(
        ids=torch.tensor([builder.ids]),
        positions=torch.tensor([builder.positions]),
        prompts=torch.tensor([[prompts[row] for row in builder.owners]]),
        segments=tuple(builder.segments),
        sources=torch.tensor([source for source, _ in ordered], dtype=torch.long),
        targets=torch.tensor([target for _, target in ordered], dtype=torch.long),
        weights=torch.tensor([float(terms[one]) for one in ordered]),
        rows=len(rows),
        row_tokens=sum(len(row.ids) for row in rows),
        owners=torch.tensor([builder.owners]),
        ends=tuple(ends),
    )


def prompt_length(row: Encoded) -> int:
    """Tokens before the first trained one; the first token is never trained, since nothing predicts it."""
    return next((at for at in range(1, len(row.ids)) if row.trained[at]), len(row.ids))


def common_start(one: Sequence[object], other: Sequence[object]) -> int:
    """How many first tokens two rows have in common."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class _Builder:
    """Lays rows out as a tree, depth first, so that ancestors come before what continues them."""

    def __init__(self, rows: Sequence[list[int]], share: int | None, marked: Sequence[Sequence[object]] | None) -> None:
        self.rows, self.share = rows, share
        self.keys: Sequence[list[Any]] = rows
        if marked is not None:
            self.keys = [list(zip(ids, those, strict=True)) for ids, those in zip(rows, marked, strict=True)]
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.owners: list[int] = []
        self.segments: list[Segment] = []
        self.places: list[list[int]] = [[] for _ in rows]
        order = sorted(range(len(rows)), key=lambda row: self.keys[row]) if share else list(range(len(rows)))
        self.grow(order, 0, ())

    def grow(self, group: Sequence[int], depth: int, ancestors: tuple[int, ...]) -> None:
        """Place rows that agree on their first `depth` tokens, which stand in `ancestors`."""
        for run in self.runs(group, depth):
            common = common_start(self.keys[run[0]], self.keys[run[-1]])
            above = self.add(run, depth, common, ancestors)
            if len(run) > 1:
                self.grow(run, common, above)

    def runs(self, group: Sequence[int], depth: int) -> list[list[int]]:
        """The sorted rows of a group cut where neighbours have too little in common beyond `depth`."""
        runs = [[group[0]]]
        for before, row in pairwise(group):
            common = common_start(self.keys[before], self.keys[row])
            if self.share and common - depth >= self.share:
                runs[-1].append(row)
            else:
                runs.append([row])
        return runs

    def add(self, run: Sequence[int], start: int, stop: int, ancestors: tuple[int, ...]) -> tuple[int, ...]:
        """A segment for tokens [start:stop] of every row of a run; returns the ancestors of what continues it."""
        first = len(self.ids)
        for row in run:
            self.places[row] += range(first, first + stop - start)
        if start == stop:
            return ancestors
        self.ids += self.rows[run[0]][start:stop]
        self.positions += range(start, stop)
        self.owners += [run[0]] * (stop - start)
        self.segments.append(Segment(first, len(self.ids), ancestors))
        return (*ancestors, len(self.segments) - 1)
