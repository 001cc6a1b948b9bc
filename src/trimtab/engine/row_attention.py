"""softmax(q kᵀ/√w) v inside the rows of a bag: every token meets its whole row, in both directions.

Rows are short and their scores small, so the scores are kept for backward, rows of like length are computed together,
and what a padded position would add is never part of a product's result. Long rows go through torch's own attention,
which keeps no scores.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.data.packing import Bag, Rows

SHORT = 64
"""Longest row whose scores are kept."""


def row_attention(bag: Bag, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, rate: float) -> Tensor:
    """Attention in a bag; query, key and value are (1, heads, tokens, width), the result (1, tokens, heads, width)."""
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    grouped = query.shape[1] // key.shape[1]
    if grouped > 1:
        key, value = (one.repeat_interleave(grouped, 1) for one in (key, value))
    outputs = []
    for rows in bag.groups:
        q, k, v = (one[0, :, rows.start : rows.stop].transpose(0, 1).flatten(1) for one in (query, key, value))
        if rows.places.shape[1] <= SHORT:
            y = _Short.apply(q, k, v, rows, query.shape[1], scale, rate)
        else:
            y = long_rows(q, k, v, rows, query.shape[1], scale, rate)
        outputs.append(y)
    whole = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return whole.view(1, -1, query.shape[1], query.shape[3])


def long_rows(q: Tensor, k: Tensor, v: Tensor, rows: Rows, heads: int, scale: float, rate: float) -> Tensor:
    """The same by torch's attention; all (tokens, heads·width)."""
    shape = (*rows.places.shape, heads, -1)
    q, k, v = (one[rows.places.flatten()].view(shape).transpose(1, 2) for one in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, rows.real[:, None, None], rate, scale=scale)
    return y.transpose(1, 2).flatten(2).flatten(0, 1)[rows.back]


def padded(x: Tensor, rows: Rows, heads: int) -> Tensor:
    """(tokens, heads·width) -> (rows·heads, longest, width)."""
    count, longest = rows.places.shape
    gathered = x.index_select(0, rows.places.flatten()).view(count, longest, heads, -1)
    return gathered.transpose(1, 2).reshape(count * heads, longest, -1)


def unpadded(y: Tensor, rows: Rows, heads: int) -> Tensor:
    """(rows·heads, longest, width) -> (tokens, heads·width)."""
    count, longest = rows.places.shape
    return y.view(count, heads, longest, -1).transpose(1, 2).reshape(count * longest, -1).index_select(0, rows.back)


class _Short(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: Rows, heads: int, scale: float, rate: float) -> Tensor:
        q, k, v = (padded(one, rows, heads) for one in (q * scale, k, v))
        count, longest = rows.places.shape
        S = torch.bmm(q, k.mT).view(count, heads, longest, longest)
        P = S.masked_fill(~rows.real[:, None, None], float("-inf")).softmax(-1).view(-1, longest, longest)
        D = torch.empty_like(P).bernoulli_(1 - rate).div_(1 - rate) if rate else None
        ctx.save_for_backward(q, k, v, P, D)
        ctx.rows, ctx.heads, ctx.scale = rows, heads, scale
        return unpadded(torch.bmm(P if D is None else P * D, v), rows, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, P, D = ctx.saved_tensors
        rows, heads = ctx.rows, ctx.heads
        count, longest = rows.places.shape
        g = dy.new_zeros(count * longest, dy.shape[1]).index_copy_(0, rows.back, dy)
        g = g.view(count, longest, heads, -1).transpose(1, 2).reshape(count * heads, longest, -1)
        dP = torch.bmm(g, v.mT)
        dv = torch.bmm((P if D is None else P * D).mT, g)
        if D is not None:
            dP = dP * D
        dS = torch._softmax_backward_data(dP, P, -1, P.dtype)
        dq, dk, dv = (unpadded(one, rows, heads) for one in (torch.bmm(dS, k), torch.bmm(dS.mT, q), dv))
        return (dq * ctx.scale, dk, dv, None, None, None, None)
