"""What a running forward pass knows of its batch: reserved positions of virtual tokens, and which tokens are prompt."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

Slots = dict[str, tuple[int, int]]
"""Reserved positions [start, stop) of each input method, counted from the end where they are negative."""


@dataclass
class Batch:
    """One forward of one stack. `slots` and `total` are empty and 0 while decoding: the cache holds what was there."""

    slots: Slots = field(default_factory=dict)
    prompt: Tensor | None = None
    """(rows, positions) bool: real tokens before the first trained one; None while decoding."""
    order: Tensor | None = None
    """(1, tokens) in a pack: where each token stands in its row; None where the batch has a line for every row."""
    lengths: Tensor | None = None
    """(1, tokens) in a pack: how many prompt tokens the token's row has."""
    total: int = 0
    """How many positions are reserved in every row."""
    mixed: dict[tuple[str, ...], Slots] = field(default_factory=dict)
    """The slots of rows that use these adapters, where rows differ."""
    sources: dict[str, Tensor] = field(default_factory=dict)
    """What methods at the running site read beside its input, by `Method.source`."""

    def of_rows(self, names: tuple[str, ...], index: Tensor) -> Batch:
        """The same for the rows at `index`, which use the adapters `names`."""
        prompt = None if self.prompt is None else self.prompt.index_select(0, index)
        sources = {name: value.index_select(0, index) for name, value in self.sources.items()}
        return Batch(self.mixed.get(names, {}), prompt, self.order, self.lengths, self.total, sources=sources)

    def replace(self, y: Tensor, values: Tensor, slot: str) -> Tensor:
        """`y` (rows, positions, width) with `values` (length, width) at the positions reserved for `slot`."""
        start, stop = self.slots.get(slot, (0, 0))
        if start == stop:
            return y
        start, stop = (start, stop) if start >= 0 else (y.shape[1] + start, y.shape[1] + stop)
        return torch.cat([y[:, :start], values.to(y.dtype).expand(y.shape[0], -1, -1), y[:, stop:]], 1)
