"""y = x Wᵀ + b + (x Aᵀ)Bᵀ in one autograd function: the product of every low-rank method on a frozen dense weight.

The same numbers as the plain expression, with less around them: the low-rank term is added into the frozen output by
the matrix product itself, so are both parts of the input's gradient, and B's gradient is taken transposed. Matrix
libraries are several times slower per multiplication on panels narrower than 16, hence the padding on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trimtab.core.remake import kept, kept_tensors
from trimtab.core.site import Base, LinearBase

NARROW = 16


def low_rank_product(x: Tensor, base: Base, A: Tensor, B: Tensor) -> Tensor:
    """base(x) + (x Aᵀ)Bᵀ for x (..., in), A (rank, in), B (out, rank)."""
    W = frozen_weight(base, x)
    if W is None or A.dtype != W.dtype or B.dtype != W.dtype:
        return base(x) + base.affine(x, A) @ B.mT
    return _LowRank.apply(x, W, base.bias, A, B)


def frozen_weight(base: Base, x: Tensor) -> Tensor | None:
    """The dense frozen weight (out, in) of an unpatched linear in eager mode on plain tensors, else None."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    if torch._C._len_torch_dispatch_stack() > 0:  # a mode that keeps or counts what single operators return
        return None
    if type(base) is not LinearBase:
        return None
    module = base.module
    W, b = module._parameters.get("weight"), module._parameters.get("bias")
    origin = getattr(type(module), "_origin", (type(module),))[0]
    plain = origin.forward is nn.Linear.forward and "_inner_forward" not in module.__dict__
    if not plain or type(W) is not nn.Parameter or type(x) not in (Tensor, nn.Parameter) or W.dtype != x.dtype:
        return None
    trained = W.requires_grad or (b is not None and b.requires_grad)
    return None if trained or torch.is_autocast_enabled(x.device.type) else W


def wide(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) with zero rows and columns up to a rank that the CPU's matrix products like."""
    missing = -A.shape[0] % NARROW if A.device.type == "cpu" and A.shape[0] < NARROW else 0
    return (F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))) if missing else (A, B)


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        wide_A, wide_B = wide(A, B)
        h = rows @ wide_A.mT  # (tokens, rank)
        y = F.linear(rows, W, b)
        y.addmm_(h, wide_B.mT)
        kept(ctx, x, W, A, B, h)
        return y.view(*x.shape[:-1], W.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, h = kept_tensors(ctx, 4)
        rank = A.shape[0]
        wide_A, wide_B = wide(A, B)
        dy = dy.reshape(-1, dy.shape[-1])
        g = dy @ wide_B  # (tokens, rank)
        dx = dA = dB = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ W).addmm_(g, wide_A).view(x.shape)
        if ctx.needs_input_grad[3]:
            dA = (g.mT @ x.reshape(-1, x.shape[-1]))[:rank]
        if ctx.needs_input_grad[4]:
            dB = (h.mT @ dy)[:rank].mT
        return dx, None, None, dA, dB
