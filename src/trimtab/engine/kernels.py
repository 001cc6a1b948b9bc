"""The element-wise parts of a decoder block as autograd functions that keep little: RMS norm and the gated product.

Both mark their output (`trimtab.core.remake`), so that the linear layer behind them keeps no copy of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.core.product import Panel, product, product_and, shaped, wide
from trimtab.core.remake import mark
from trimtab.core.scratch import room


def rms_norm(x: Tensor, w: Tensor, epsilon: float) -> Tensor:
    """y = w ∘ x / √(mean(x²) + ε) over the last axis, in fp32, with w frozen; x (..., width), w (width)."""
    y, scale = _RMSNorm.apply(x, w, epsilon)
    return mark(y, scaled, (x, scale, w))


def scaled(x: Tensor, scale: Tensor, w: Tensor) -> Tensor:
    """w ∘ (x·scale), the product with the scale taken in fp32 and rounded to the type of x."""
    y = (x.to(scale.dtype) * scale).to(x.dtype)
    return y.mul_(w) if y.dtype == w.dtype else y * w


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        wide = x.float()
        scale = torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(epsilon).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, scale, w)
        ctx.mark_non_differentiable(scale)
        return scaled(x, scale, w), scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, unused: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, w = ctx.saved_tensors
        wide = x.float()
        u = (dy * w).float()
        share = torch.linalg.vecdot(u, wide).unsqueeze(-1).mul_(scale**3).div_(x.shape[-1])
        return u.mul_(scale).addcmul_(wide, share, value=-1).to(x.dtype), None, None


def gated(g: Tensor, u: Tensor, gate: str) -> Tensor:
    """m = act(g) ∘ u, the middle of a gated feed-forward; `gate` names the activation in `GATES`."""
    return mark(_Gated.apply(g, u, gate), middle, (g, u), gate)


def middle(g: Tensor, u: Tensor, gate: str) -> Tensor:
    """act(g) ∘ u."""
    return GATES[gate][0](g).mul_(u)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor, gate: str) -> Tensor:
        ctx.save_for_backward(g, u)
        ctx.gate = gate
        return middle(g, u, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dm: Tensor) -> tuple[Tensor | None, ...]:
        g, u = ctx.saved_tensors
        forward, backward = GATES[ctx.gate]
        return backward(dm * u, g), forward(g).mul_(dm), None


def gated_product(g: Tensor, u: Tensor, gate: str, down: Panel) -> Tensor:
    """W m + b + B (A m) of m = act(g) ∘ u, g and u (..., in): a gated feed-forward's way back, m never kept."""
    return _GatedProduct.apply(g, u, gate, *down)


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, g: Tensor, u: Tensor, gate: str, W: Tensor, b: Tensor | None, A: Tensor | None, B: Tensor | None
    ) -> Tensor:
        m = activated(g.reshape(-1, g.shape[-1]), gate)[0].mul_(u.reshape(-1, u.shape[-1]))
        A16, (B16,), _ = wide([Panel(W, b, A, B)])
        h = None if A16 is None else m @ A16.mT  # (tokens, rank)
        y = product(m, W, b) if h is None or B16 is None else product_and(m, W, b, h, B16)
        ctx.save_for_backward(g, u, W, A, B, h)
        ctx.gate = gate
        return shaped(y, (*g.shape[:-1], W.shape[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        g, u, W, A, B, h = ctx.saved_tensors
        shape, dA, dB = g.shape, None, None
        g, u, dy = (one.reshape(-1, one.shape[-1]) for one in (g, u, dy))
        a, slope = activated(g, ctx.gate, slope=True)
        m = None
        dm = product(dy, W.mT)
        if h is not None:
            A16, (B16,), _ = wide([Panel(W, None, A, B)])
            assert A16 is not None
            assert B16 is not None
            share = dy @ B16  # (tokens, rank)
            dm.addmm_(share, A16)
            if ctx.needs_input_grad[6]:
                dB = (h.mT @ dy)[: len(A)].mT
            if ctx.needs_input_grad[5]:
                m = a * u
                dA = (share.mT @ m)[: len(A)]
        du = torch.mul(a, dm, out=m)  # in m's own memory, if it was made
        dg = dm.mul_(slope.mul_(u))  # dm's own memory, no longer needed: fresh memory costs more than the product
        return dg.view(shape), du.view(shape), None, None, None, dA, dB


def activated(g: Tensor, gate: str, slope: bool = False) -> tuple[Tensor, Tensor]:
    """act(g) and, if asked, its derivative, g (tokens, width): in memory that the next call uses again."""
    forward, backward = GATES[gate]
    if gate != "silu":
        return forward(g), backward(torch.ones_like(g), g) if slope else g
    s = torch.sigmoid(g, out=room("s", g, g.shape))
    a = torch.mul(g, s, out=room("a", g, g.shape))
    return a, s.addcmul_(s, a, value=-1).add_(a) if slope else s  # σ + a − aσ


Pair = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]
GATES: dict[str, Pair] = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda dy, x: torch.ops.aten.gelu_backward(dy, x, approximate="tanh"),
    ),
}
"""Activation -> (its value, its gradient from (dy, x))."""
