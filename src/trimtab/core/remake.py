"""Tensors that are cheaper to make again than to keep: what a backward pass saves instead of them.

A norm or a gate marks its output with how it was made. Who would save that output for backward saves its ingredients
instead, which the norm or the gate keeps anyway, and makes it again when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Ingredients(NamedTuple):
    """How to make a tensor again, bit for bit."""

    make: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    settings: tuple[Any, ...] = ()

    def again(self) -> Tensor:
        return self.make(*self.tensors, *self.settings)


def mark(tensor: Tensor, make: Callable[..., Tensor], tensors: tuple[Tensor, ...], *settings: Any) -> Tensor:
    """Note on a tensor how it was made; returns it. Nobody may change the tensor in place afterwards."""
    tensor._trimtab_made = Ingredients(make, tensors, settings)  # type: ignore[attr-defined]
    return tensor


def kept(ctx: Any, tensor: Tensor, *others: Tensor) -> None:
    """Save `tensor`, or what it can be made from, and `others`, in the context of an autograd function."""
    made: Ingredients | None = getattr(tensor, "_trimtab_made", None)
    if made is None:
        ctx.made = None
        ctx.save_for_backward(*others, tensor)
    else:
        ctx.made = made.make, made.settings
        ctx.save_for_backward(*others, *made.tensors)


def kept_tensors(ctx: Any, others: int) -> tuple[Tensor, ...]:
    """What `kept` was given: (tensor, *others)."""
    saved = ctx.saved_tensors
    if ctx.made is None:
        return saved[others], *saved[:others]
    make, settings = ctx.made
    return make(*saved[others:], *settings), *saved[:others]
