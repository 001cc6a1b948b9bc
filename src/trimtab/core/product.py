"""y = x Wᵀ + b as the fastest library on this machine computes it, and low-rank factors as panels beside W.

Matrix libraries are several times slower per multiplication on panels narrower than 16, hence the padding on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.core.scratch import room

NARROW = 16
LARGE = 1 << 16
"""Entries of a frozen weight from which oneDNN is asked: below, its set-up costs more than it saves."""


class Panel(NamedTuple):
    """A frozen linear W (out, in) and b (out), with low-rank factors A (rank, in) and B (out, rank) or without."""

    W: Tensor
    b: Tensor | None
    A: Tensor | None = None
    B: Tensor | None = None


def product(x: Tensor, W: Tensor, b: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
    """x Wᵀ + b + plus for x (rows, in) and W (out, in), without gradients: by oneDNN where that is the faster library.

    The memory of `plus` (rows, out) may become the result's.
    """
    if onednns(x, W):
        by_onednn = torch.ops.mkldnn._linear_pointwise
        return by_onednn(x, W, b, "none", [], "") if plus is None else by_onednn.binary(x, plus, W, b, "add")
    if plus is not None:
        return plus.addmm_(x, W.mT) if b is None else plus.addmm_(x, W.mT).add_(b)
    return F.linear(x, W, b)


def shaped(y: Tensor, shape: Sequence[int]) -> Tensor:
    """y in another shape, not as a view: what an autograd function returns as one, no model may change in place."""
    return torch.ops.aten._unsafe_view.default(y, shape)


def onednns(x: Tensor, W: Tensor) -> bool:
    """Whether the product of x (rows, in) and W (out, in) is one for oneDNN: in fp32 on a CPU, and not small."""
    fits = x.dtype == W.dtype == torch.float32 and x.device.type == "cpu"
    large = fits and x.shape[0] >= NARROW and W.numel() >= LARGE
    return large and hasattr(torch.ops.mkldnn, "_linear_pointwise") and bool(torch.backends.mkldnn.enabled)


def product_and(x: Tensor, W: Tensor, b: Tensor | None, h: Tensor, B: Tensor) -> Tensor:
    """x Wᵀ + b + h Bᵀ for h (rows, rank) and B (out, rank), without gradients.

    Written once where the result is no larger than x: it may then be kept for a second run (`engine.selective`).
    """
    if W.shape[0] > W.shape[1] or not (onednns(x, W) or x.is_meta):  # on meta a CPU is planned for
        return product(x, W, b).addmm_(h, B.mT)
    addend = torch.mm(h, B.mT, out=room("addend", h, (x.shape[0], W.shape[0])))
    return torch.addmm(addend, x, W.mT) if x.is_meta else product(x, W, b, addend)


def wide(panels: Sequence[Panel]) -> tuple[Tensor | None, list[Tensor | None], list[int]]:
    """All A's as one panel (ranks, in); each B (out, ranks) with zero columns but for its own; where each begins.

    Zero rows fill the panel up to a rank that the CPU's matrix products like.
    """
    ranks = [0 if one.A is None else one.A.shape[0] for one in panels]
    starts, total = [sum(ranks[:at]) for at in range(len(ranks))], sum(ranks)
    whole = [one.A for one in panels if one.A is not None]
    if not whole:
        return None, [None] * len(panels), starts
    missing = -total % NARROW if whole[0].device.type in ("cpu", "meta") else 0
    if missing:
        whole.append(whole[0].new_zeros(missing, whole[0].shape[1]))
    A = whole[0] if len(whole) == 1 else torch.cat(whole)
    Bs = [
        None if one.B is None else F.pad(one.B, (start, total + missing - start - rank))
        for one, start, rank in zip(panels, starts, ranks, strict=True)
    ]
    return A, Bs, starts
