"""Products with a sparse (out, in) matrix given by flat positions and values, without a dense matrix or gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 22
"""Elements of the largest temporary."""


def sparse_linear(x: Tensor, value: Tensor, index: Tensor, shape: tuple[int, int]) -> Tensor:
    """x Sᵀ for S (out, in) with `value` (k) at the flat row-major positions `index` (k); x (..., in) -> (..., out)."""
    flat = x.reshape(-1, x.shape[-1])
    y = SparseLinear.apply(flat, value.to(x.dtype), index, shape[0])
    return y.view(*x.shape[:-1], shape[0])


class SparseLinear(torch.autograd.Function):
    """dx = g S and dv_i = Σ_t g[t, row_i]·x[t, col_i]: both gathered in chunks along the k positions."""

    @staticmethod
    def forward(x: Tensor, value: Tensor, index: Tensor, out: int) -> Tensor:
        yT = x.new_zeros(out, x.shape[0])
        xT = x.mT.contiguous()
        for rows, cols, v in _chunks(index, value, x.shape):
            yT.index_add_(0, rows, xT.index_select(0, cols) * v[:, None])
        return yT.mT.contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, value, index, _ = inputs
        ctx.save_for_backward(x, value, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, value, index = ctx.saved_tensors
        gT, xT = grads[0].mT.contiguous(), x.mT.contiguous()
        dxT = torch.zeros_like(xT) if ctx.needs_input_grad[0] else None
        dv = []
        for rows, cols, v in _chunks(index, value, x.shape):
            g = gT.index_select(0, rows)
            dv.append((g * xT.index_select(0, cols)).sum(1))
            if dxT is not None:
                dxT.index_add_(0, cols, g * v[:, None])
        return None if dxT is None else dxT.mT, torch.cat(dv) if dv else torch.zeros_like(value), None, None


def _chunks(index: Tensor, value: Tensor, shape: torch.Size) -> Any:
    rows, cols = index.div(shape[1], rounding_mode="floor"), index.remainder(shape[1])
    size = max(1, CHUNK // max(1, shape[0]))
    return zip(rows.split(size), cols.split(size), value.split(size), strict=True)
