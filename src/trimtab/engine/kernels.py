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

from trimtab.core.remake import mark


def rms_norm(x: Tensor, w: Tensor, epsilon: float) -> Tensor:
    """y = w ∘ x / √(mean(x²) + ε) over the last axis, in fp32, with w frozen; x (..., width), w (width)."""
    y, scale = _RMSNorm.apply(x, w, epsilon)
    return mark(y, scaled, (x, scale, w))


def scaled(x: Tensor, scale: Tensor, w: Tensor) -> Tensor:
    """w ∘ (x·scale), the product with the scale taken in fp32 and rounded to the type of x."""
    return (x.to(scale.dtype) * scale).to(x.dtype) * w


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
    return mark(_Gated.apply(g, u, gate), product, (g, u), gate)


def product(g: Tensor, u: Tensor, gate: str) -> Tensor:
    """act(g) ∘ u."""
    return GATES[gate][0](g).mul_(u)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor, gate: str) -> Tensor:
        ctx.save_for_backward(g, u)
        ctx.gate = gate
        return product(g, u, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dm: Tensor) -> tuple[Tensor | None, ...]:
        g, u = ctx.saved_tensors
        forward, backward = GATES[ctx.gate]
        return backward(dm * u, g), forward(g).mul_(dm), None


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
