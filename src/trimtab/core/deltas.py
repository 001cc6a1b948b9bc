"""Deltas: all that is attached to one module, in order; what its swapped class calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.batch import Batch
from trimtab.core.delta import Delta
from trimtab.core.errors import UserError, listing
from trimtab.core.grouped import grouped
from trimtab.core.site import Base, Edited, Known
from trimtab.core.state import State


class Deltas(nn.ModuleDict):
    """The deltas of one module in the order they were attached; what the swapped class calls."""

    way: ClassVar[str] = "through its forward"
    """How they edit their module, in words; there is one way a module."""
    state: State
    stack: str
    width: int
    hook: Any
    sources: tuple[str, ...]
    """What methods here read beside the site's input."""
    ears: dict[str, Any]
    """Source -> the hook where it passes by."""
    heard: dict[str, Tensor]
    """What passed by in the running forward; forgotten when the site is done, since it would be held for nothing."""

    def __init__(self, state: State, stack: str) -> None:
        super().__init__()
        self.__dict__["state"], self.__dict__["stack"] = state, stack
        self.__dict__["sources"], self.__dict__["ears"], self.__dict__["heard"] = (), {}, {}
        self.__dict__["index"] = None

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self.__dict__["index"] = None
        super().__setitem__(key, module)

    def __delitem__(self, key: str) -> None:
        self.__dict__["index"] = None
        super().__delitem__(key)

    def of(self, names: Sequence[str]) -> list[Delta]:
        """The deltas of these adapters in the order they were attached, without a look at all the others."""
        index = self.__dict__["index"]
        if index is None:
            index = {}
            for place, (key, delta) in enumerate(self.items()):
                index.setdefault(delta.adapter, []).append((place, key))
            self.__dict__["index"] = index
        places = sorted(place for name in set(names) for place in index.get(name, ()))
        return [self._modules[key] for _, key in places]  # type: ignore[misc]

    @property
    def batch(self) -> Batch | None:
        batch = self.state.batches.get(self.stack)
        if not self.sources:
            return batch
        missing = [source for source in self.sources if source not in self.heard]
        if missing:
            raise UserError(
                f"forward: {listing(missing)} did not pass by before the site that reads it",
                fix="name modules by their path in `where`, whose own input is read then",
            )
        return replace(batch or Batch(), sources=dict(self.heard))

    def over(self, base: Base, names: Sequence[str]) -> Base:
        """The base with the deltas of these adapters stacked on it."""
        for delta in self.of(names):
            base = Edited(base, delta, delta.rows)
        return base

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.state.rows is None:
            out = self.over(base, self.state.active)(x)
            self.heard.clear()
            return out
        y = base(x)
        groups = self.state.row_groups(x.shape[0])
        used = {names: self.of(names) for names, _ in groups}
        out, done = grouped(id(self), self.state, used, x, y, base, groups)
        for names, rows in groups:
            if names not in done and used[names]:
                index = torch.tensor(rows, device=x.device)
                part = x.index_select(0, index)
                batch = base.batch.of_rows(names, index) if base.batch is not None else None
                edited = self.over(Known(base, None, part, y.index_select(0, index), batch), names)
                out = out.index_copy(0, index, edited(part))
        self.heard.clear()
        return out


def edited_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module that carries deltas, with its path."""
    for name, module in model.named_modules():
        if isinstance(module._modules.get("delta"), Deltas):
            yield name, module
