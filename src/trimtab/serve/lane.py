"""Rows that decode together: each with its adapter, its own length, joining and leaving between two steps.

Keys and values of all rows lie in one cache. Its columns are first those of virtual tokens, as many as the row with the
most has, then those of the text; each part is filled up on the left, and the mask hides the filling. A row that joins
is read by a forward of its own (with the others that join at once), and its columns are put beside the rest.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.attach import rearrange
from trimtab.core.errors import UserError, listing
from trimtab.core.state import require_state, state_of
from trimtab.evaluate.generate import room_of, virtual_of


@dataclass(eq=False)
class Row:
    """One sequence in a lane: the ids of its prompt, the adapters it uses, and its latest token."""

    ids: list[int]
    names: tuple[str, ...] = ()
    last: int = 0
    length: int = field(init=False)
    """How many tokens of text the cache holds of it."""

    def __post_init__(self) -> None:
        self.length = len(self.ids)


class Lane:
    """The running rows of a model and their cache."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.takes = set(inspect.signature(model.forward).parameters)
        self.device = next(model.parameters()).device
        self.rows: list[Row] = []
        self.cache: Any = None
        self.mask = torch.zeros(0, 0, dtype=torch.long, device=self.device)  # (rows, text columns)
        self.virtual = 0

    def join(self, rows: Sequence[Row]) -> Tensor:
        """Read the prompts of new rows; returns the logits (new rows, vocabulary) of their first tokens."""
        from transformers import DynamicCache

        longest = max(len(row.ids) for row in rows)
        ids = torch.tensor([[row.ids[0]] * (longest - len(row.ids)) + row.ids for row in rows], device=self.device)
        mask = torch.tensor([[0] * (longest - len(row.ids)) + [1] * len(row.ids) for row in rows], device=self.device)
        cache = DynamicCache()
        logits = self.forward(rows, ids, mask, cache)
        virtual = most_virtual(self.model, rows)
        if not self.rows:
            self.cache, self.mask, self.virtual = cache, mask, virtual
        else:
            self.put_beside(cache, mask, virtual)
        self.rows += rows
        return logits

    def step(self) -> Tensor:
        """One forward of every row's latest token; returns the logits (rows, vocabulary) of the next ones."""
        ids = torch.tensor([[row.last] for row in self.rows], device=self.device)
        mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), 1)], 1)
        logits = self.forward(self.rows, ids, mask, self.cache)
        self.mask = mask
        for row in self.rows:
            row.length += 1
        return logits

    def forward(self, rows: Sequence[Row], ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
        """Run the model over the ids (rows, new) of these rows behind what the cache holds."""
        own = [row.names for row in rows]
        if state_of(self.model) is not None:
            rearrange(self.model, own if len(set(own)) > 1 else own[0])
        last = room_of(self.model, []) - 1
        positions = (mask.cumsum(1) - 1).clamp(0, last)[:, -ids.shape[1] :]
        call = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        call |= {"use_cache": True, "logits_to_keep": 1}
        output = self.model(**{name: value for name, value in call.items() if name in self.takes})
        return output.logits[:, -1]

    def keep(self, wanted: Sequence[Row]) -> None:
        """Let all other rows go, and the columns that none of the rest uses."""
        if len(wanted) == len(self.rows):
            return
        index = torch.tensor([at for at, row in enumerate(self.rows) if row in wanted], device=self.device)
        self.rows = [row for row in self.rows if row in wanted]
        if not self.rows:
            self.cache, self.virtual, self.mask = None, 0, self.mask.new_zeros(0, 0)
            return
        virtual, longest = most_virtual(self.model, self.rows), max(row.length for row in self.rows)
        spare, gone = self.virtual - virtual, self.mask.shape[1] - longest

        def cut(values: Tensor) -> Tensor:
            values = values.index_select(0, index)
            return torch.cat([values[:, :, spare : self.virtual], values[:, :, self.virtual + gone :]], 2)

        for layer in held(self.cache):
            layer.keys, layer.values = cut(layer.keys), cut(layer.values)
        self.mask, self.virtual = self.mask.index_select(0, index)[:, gone:], virtual

    def put_beside(self, cache: Any, mask: Tensor, virtual: int) -> None:
        """Add the rows of another cache; the shorter one's two parts are filled up on the left."""
        most, longest = max(self.virtual, virtual), max(self.mask.shape[1], mask.shape[1])

        def widened(values: Tensor, own: int) -> Tensor:
            front, text = values[:, :, :own], values[:, :, own:]
            return torch.cat([F.pad(front, (0, 0, most - own, 0)), F.pad(text, (0, 0, longest - text.shape[2], 0))], 2)

        for mine, other in zip(held(self.cache), held(cache), strict=True):
            mine.keys = torch.cat([widened(mine.keys, self.virtual), widened(other.keys, virtual)])
            mine.values = torch.cat([widened(mine.values, self.virtual), widened(other.values, virtual)])
        masks = [F.pad(one, (longest - one.shape[1], 0)) for one in (self.mask, mask)]
        self.mask, self.virtual = torch.cat(masks), most


def held(cache: Any) -> Iterator[Any]:
    """The layers of a cache that hold anything; some models share one layer's between several."""
    return (layer for layer in cache.layers if layer.is_initialized)


def most_virtual(model: nn.Module, rows: Sequence[Row]) -> int:
    """The most virtual tokens that a row's adapters have."""
    return max(virtual_of(model, row.names) for row in rows)


def slides(model: nn.Module) -> bool:
    """Whether any layer sees a window of the last tokens only."""
    config = getattr(model, "config", None)
    text: Any = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    kinds = getattr(text, "layer_types", None)
    if kinds is not None:
        return any("sliding" in kind or "chunked" in kind for kind in kinds)
    return bool(getattr(text, "sliding_window", None)) and getattr(text, "use_sliding_window", True)


def check_cache(model: nn.Module) -> None:
    """Refuse a model that does not keep plain keys and values, one column for every token."""
    from transformers import DynamicCache

    cache, length = DynamicCache(), 3
    device = next(model.parameters()).device
    ids = torch.zeros(1, length, dtype=torch.long, device=device)
    takes = inspect.signature(model.forward).parameters
    if "past_key_values" not in takes:
        raise UserError(f"serve: {type(model).__name__} does not write, or keeps no cache of keys and values")
    if state_of(model) is not None:
        rearrange(model, None)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
    if slides(model) and virtual_of(model):
        state = require_state(model, "serve")
        with_tokens = [name for name in state.adapters if virtual_of(model, [name])]
        raise UserError(
            f"serve: {type(model).__name__} attends within a window, where the virtual tokens of "
            f"{listing(with_tokens)} would be at other distances in a batch than alone",
            fix="trimtab chat runs them one at a time; other methods can be served",
        )
    shapes = {tuple(layer.keys.shape[2:3]) for layer in held(cache) if getattr(layer, "keys", None) is not None}
    odd = [type(layer).__name__ for layer in cache.layers if type(layer).__name__ != "DynamicLayer"]
    if shapes != {(length,)} or odd:
        raise UserError(
            f"serve: {type(model).__name__} keeps something else than keys and values of every token "
            f"({', '.join(sorted(set(odd))) or 'nothing'}), so rows cannot join and leave",
            fix="trimtab eval or trimtab chat run it one row or batch at a time",
        )
