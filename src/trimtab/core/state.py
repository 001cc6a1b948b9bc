"""What a model knows of its adapters: plain data, kept in the root's `__dict__`, copied with the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.batch import Batch
from trimtab.core.errors import UserError, listing, nearest
from trimtab.core.format import Format
from trimtab.core.method import Method
from trimtab.core.places import Place


class Kept(dict[Any, Any]):
    """What is kept between forwards; a copy of the model starts with nothing."""

    def __reduce__(self) -> Any:
        return Kept, ()


@dataclass
class Part:
    """One method of an adapter, with the places it is at."""

    method: Method
    where: str
    label: str
    places: list[Place]
    format: Format | None = None
    """What its weights are stored in, where they were encoded without what its start takes out."""


@dataclass
class Adapter:
    """A named set of parts that are attached, activated, saved and merged together."""

    name: str
    seed: int
    parts: list[Part]


@dataclass
class State:
    """What a model knows of its adapters: plain data, kept in the root's `__dict__`, copied with the model."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    rows: list[tuple[str, ...]] | None = None
    frozen: dict[str, bool] = field(default_factory=dict)
    batches: dict[str, Batch] = field(default_factory=dict)
    prompt: Tensor | None = None
    prompt_held: bool = False
    packed: tuple[Tensor, Tensor] | None = None
    """Of a running pack, (1, tokens) each: where a token stands in its row, and how many prompt tokens the row has."""
    hooks: list[Any] = field(default_factory=list)
    padded: list[Any] = field(default_factory=list)
    """torch's encoders that would pack padded rows into nested tensors, which no method takes; kept from it."""
    kept: Kept = field(default_factory=Kept)
    """Stacked factors of the rows' adapters; forgotten when other adapters are activated."""

    def row_groups(self, size: int) -> list[tuple[tuple[str, ...], list[int]]]:
        """Batch rows by the adapters they use. A batch of k·rows (beams, flattened tokens) repeats each row k times."""
        assert self.rows is not None
        if size % len(self.rows):
            raise UserError(
                f"activate: the batch has {size} rows and {len(self.rows)} adapter names were given",
                fix="give one name (or None) per row, or activate one adapter for all rows",
            )
        found = None if torch.compiler.is_compiling() else self.kept.get("groups")
        if found is not None and found[0] is self.rows and found[1] == size:
            return found[2]
        groups: dict[tuple[str, ...], list[int]] = {}
        repeat = size // len(self.rows)
        for row in range(size):
            groups.setdefault(self.rows[row // repeat], []).append(row)
        listed = list(groups.items())
        if not torch.compiler.is_compiling():
            self.kept["groups"] = (self.rows, size, listed)
        return listed


def state_of(model: nn.Module) -> State | None:
    """The adapters of a model, or None when it has none."""
    return model.__dict__.get("_trimtab")


def require_state(model: nn.Module, verb: str) -> State:
    """As `state_of`, but an error naming `verb` when nothing is attached."""
    state = state_of(model)
    if state is None or not state.adapters:
        raise UserError(
            f"{verb}: no adapter is attached to this {type(model).__name__}", fix="trimtab.attach(model, ...)"
        )
    return state


def check_names(state: State, names: Sequence[str], verb: str) -> None:
    """Every name is an attached adapter, else one error naming all that are not."""
    unknown = [name for name in dict.fromkeys(names) if name not in state.adapters]
    if unknown:
        close = [near for name in unknown for near in nearest(name, state.adapters)]
        raise UserError(
            f"{verb}: no adapter named {listing(unknown)}; attached: {listing(state.adapters)}",
            fix=f"did you mean {listing(close)}?" if close else None,
        )
