"""A frozen bottom, computed once: what the blocks below the lowest trained one put out for every training row.

Without dropout below them these outputs are the same in every epoch, so they are kept, and a step begins at the first
block that something trains in. Kept are outputs of rows packed in file order: a resumed run has the same bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.method import InputMethod
from trimtab.core.modes import dropout_rates, evaluating
from trimtab.core.swap import swap, unswap
from trimtab.data.packing import Bag, Pack
from trimtab.engine.attention import attached
from trimtab.engine.checkpointing import stacks_of

NAME = "_trimtab_bottom"
"""Where a model keeps its bottom while it trains."""
NOISE = re.compile("jitter|noise")
"""What routers of experts call what they add while they train."""


@dataclass
class Bottom:
    """The outputs of the first `depth` blocks for all rows, (tokens, width) end to end, on the host."""

    depth: int
    hidden: Tensor
    starts: Tensor
    """(rows,): where each row begins."""
    beside: tuple[None, ...] | None
    """What a block returns beside its output, all of it nothing; None where it returns no tuple."""
    narrowed: bool
    """Whether only each row's first token is left behind these blocks."""
    now: Tensor | None = None
    """The outputs for the batch that runs now."""

    def of(self, batch: Pack | Bag, rows: Sequence[int]) -> Tensor:
        """The outputs for a batch of these rows that is on the host, as the lowest block that runs takes them."""
        starts = self.starts[torch.tensor(rows)]
        if isinstance(batch, Pack):
            return self.hidden[starts[batch.owners[0]] + batch.positions[0]][None]
        if self.narrowed:
            return self.hidden[starts][:, None]
        lengths = torch.cat([self.starts, torch.tensor([len(self.hidden)])])[torch.tensor(rows) + 1] - starts
        places = torch.empty(int(lengths.sum()), dtype=torch.long)
        for start, length, at in zip(starts.tolist(), lengths.tolist(), batch.first.tolist(), strict=True):
            places[at : at + length] = torch.arange(start, start + length)
        return self.hidden[places][None]


class Reached(Exception):
    """A block has its output; what comes after it does not run."""


def frozen_blocks(model: nn.Module) -> int:
    """How many blocks from the input up nothing trains or is attached in; 0 where virtual tokens go through them."""
    stacks = stacks_of(model)
    if len(stacks) != 1 or any(isinstance(method, InputMethod) for method in attached(model)):
        return 0
    changed = [at for at, block in enumerate(stacks[0]) if any(map(is_changed, block.modules()))]
    return changed[0] if changed else len(stacks[0])


def is_changed(module: nn.Module) -> bool:
    """Whether something is attached to a module, or trains in it."""
    trained = any(one is not None and one.requires_grad for one in module._parameters.values())
    return trained or "delta" in module._modules


def computed(
    model: Any, depth: int, batches: Iterable[Pack | Bag], run: Callable[[Pack | Bag], object]
) -> Bottom | None:
    """The bottom of rows in these batches, in order; None where it is not the same for a row in every epoch.

    That is, where something below is drawn anew (dropout, a router's noise), or where what trains or is attached
    outside the blocks comes before them; or where the blocks put out another number of tokens than they are given. A
    pack shares no tokens between its rows.
    """
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    if draws(model.config) or draws(text):
        return None
    block, early = stacks_of(model)[0][depth - 1], list[nn.Module]()
    made: list[Any] = []

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        made.append(output)
        raise Reached

    hooks = [one.register_forward_pre_hook(lambda module, args: early.append(module)) for one in model.modules()]
    last = block.register_forward_hook(stop)
    kept: list[Tensor] = []
    starts, total = list[int](), 0
    beside: tuple[None, ...] | None = None
    narrowed = False
    try:
        with evaluating(model), torch.no_grad():
            for batch in batches:
                with suppress(Reached):
                    run(batch)
                for hook in hooks:
                    hook.remove()
                if not made or any(is_changed(one) or draws(one) for one in early):
                    return None
                early.clear()
                out = made.pop()
                output, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
                if rest and any(one is not None for one in rest):
                    return None
                beside = None if rest is None else tuple(None for _ in rest)
                firsts = isinstance(batch, Bag) and output.shape[:2] == (batch.rows, 1) != batch.ids.shape
                if not firsts and output.shape[:2] != batch.ids.shape:
                    return None
                hidden, lengths = (output[:, 0], [1] * batch.rows) if firsts else in_rows(output, batch)
                narrowed |= firsts
                kept.append(hidden.cpu())
                for length in lengths:
                    starts.append(total)
                    total += length
    finally:
        last.remove()
        for hook in hooks:
            hook.remove()
    return Bottom(depth, torch.cat(kept), torch.tensor(starts), beside, narrowed)


def draws(thing: Any) -> bool:
    """Whether a module or a configuration has a rate above 0 of something drawn anew in training, a head's aside."""
    rates = {name: value for name, value in vars(thing).items() if NOISE.search(name) and isinstance(value, float)}
    names = [name for name, value in rates.items() if value > 0] + [name for name, _ in dropout_rates(thing)]
    return any("classifier" not in name for name in names)


def in_rows(output: Tensor, batch: Pack | Bag) -> tuple[Tensor, list[int]]:
    """(tokens, width) of a batch in the order of its rows, and how many tokens each has."""
    if isinstance(batch, Pack):
        return output[0], torch.bincount(batch.owners[0].cpu(), minlength=batch.rows).tolist()
    first, order = batch.first.cpu(), torch.argsort(batch.first.cpu())
    ends = torch.cat([first[order][1:], torch.tensor([batch.ids.shape[1]])])
    stops = torch.empty_like(first)
    stops[order] = ends
    parts = [output[0, start:stop] for start, stop in zip(first.tolist(), stops.tolist(), strict=True)]
    return torch.cat(parts), [len(one) for one in parts]


@contextmanager
def on_bottom(model: nn.Module, bottom: Bottom | None) -> Iterator[None]:
    """Batches that carry what a bottom makes of them begin above it inside; others run whole."""
    if bottom is None:
        yield
        return
    blocks = stacks_of(model)[0][: bottom.depth]
    for block in blocks:
        block.__dict__[NAME] = (bottom, block is blocks[-1])
        swap(block, passed_by)
    model.__dict__[NAME] = bottom
    try:
        yield
    finally:
        del model.__dict__[NAME]
        for block in blocks:
            unswap(block)
            del block.__dict__[NAME]


@contextmanager
def beginning_at(model: nn.Module, hidden: Tensor | None) -> Iterator[None]:
    """The forward inside begins with these outputs of its bottom; None: at the input."""
    bottom: Bottom | None = model.__dict__.get(NAME)
    if bottom is None or hidden is None:
        yield
        return
    bottom.now = hidden
    try:
        yield
    finally:
        bottom.now = None


def passed_by(cls: type) -> dict[str, Any]:
    """Namespace of a block of a bottom: the last one returns what is kept, those below what they are given."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        bottom, is_last = self.__dict__[NAME]
        if bottom.now is None:
            return cls.__call__(self, *args, **kwargs)
        out = bottom.now if is_last else args[0] if args else kwargs["hidden_states"]
        return out if bottom.beside is None else (out, *bottom.beside)

    return {"__call__": call}
