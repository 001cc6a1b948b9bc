"""y = x Wᵀ + b + (x Aᵀ)Bᵀ in one autograd function: the product of every low-rank method on frozen dense weights.

The same numbers as the plain expression, with less around them: the low-rank term is added into the frozen output by
the matrix product itself, so are all parts of the input's gradient, and B's gradient is taken transposed. Several
linears that read one input share the panel of their A's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from trimtab.core.product import Panel, product, product_and, shaped, wide
from trimtab.core.remake import kept, kept_tensors
from trimtab.core.site import Base, LinearBase
from trimtab.core.swap import below


def low_rank_product(x: Tensor, base: Base, A: Tensor, B: Tensor) -> Tensor:
    """base(x) + (x Aᵀ)Bᵀ for x (..., in), A (rank, in), B (out, rank)."""
    W = frozen_weight(base, x)
    if W is None or A.dtype != W.dtype or B.dtype != W.dtype:
        return base(x) + base.affine(x, A) @ B.mT
    return low_rank_products(x, [Panel(W, base.bias, A, B)])[0]


def low_rank_products(x: Tensor, panels: Sequence[Panel]) -> tuple[Tensor, ...]:
    """x W_iᵀ + b_i + (x A_iᵀ)B_iᵀ of several linears that read the same x (..., in)."""
    return _LowRank.apply(x, *(tensor for panel in panels for tensor in panel))


def frozen_product(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """x Wᵀ + b for x (..., in) with W (out, in) and b (out) frozen: nothing but W is kept for backward."""
    return _Frozen.apply(x, W, b)


def frozen_weight(base: Base, x: Tensor) -> Tensor | None:
    """The dense frozen weight (out, in) of an unpatched linear in eager mode on plain tensors, else None."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    if (
        torch._C._len_torch_dispatch_stack() > 0 and not only_watched()
    ):  # a mode that keeps what single operators return
        return None
    if type(base) is not LinearBase:
        return None
    module = base.module
    W, b = module._parameters.get("weight"), module._parameters.get("bias")
    cls = type(module)
    while vars(cls).get("_transparent"):
        cls = below(cls)
    plain = below(cls).forward is nn.Linear.forward and "_inner_forward" not in module.__dict__
    if not plain or type(W) is not nn.Parameter or type(x) not in (Tensor, nn.Parameter) or W.dtype != x.dtype:
        return None
    trained = W.requires_grad or (b is not None and b.requires_grad)
    return None if trained or (not x.is_meta and torch.is_autocast_enabled(x.device.type)) else W


def only_watched() -> bool:
    """Whether every active mode says that it only watches operators, so that one function is as good as several."""
    return all(getattr(mode, "only_watches", False) for mode in _get_current_dispatch_mode_stack())


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(W)
        return shaped(product(x.reshape(-1, x.shape[-1]), W, b), (*x.shape[:-1], W.shape[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (W,) = ctx.saved_tensors
        return product(dy.reshape(-1, dy.shape[-1]), W.mT).view(*dy.shape[:-1], W.shape[1]), None, None


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        panels = [Panel(*tensors[at : at + 4]) for at in range(0, len(tensors), 4)]  # type: ignore[arg-type]
        rows = x.reshape(-1, x.shape[-1])
        A, Bs, _ = wide(panels)
        h = None if A is None else rows @ A.mT  # (tokens, ranks)
        outputs = []
        for one, B in zip(panels, Bs, strict=True):
            y = product(rows, one.W, one.b) if h is None or B is None else product_and(rows, one.W, one.b, h, B)
            outputs.append(shaped(y, (*x.shape[:-1], one.W.shape[0])))
        ctx.shape = x.shape
        ctx.lone = [one.A is None for one in panels]
        ctx.set_materialize_grads(False)
        saved = [tensor for one in panels for tensor in (one.W, one.A, one.B) if tensor is not None]
        ctx.count = len(saved) + (h is not None)
        kept(ctx, x, *saved, *([] if h is None else [h]))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *saved = kept_tensors(ctx, ctx.count)
        h = saved.pop() if not all(ctx.lone) else None
        found = iter(saved)
        panels = [
            Panel(next(found), None) if lone else Panel(next(found), None, next(found), next(found))
            for lone in ctx.lone
        ]
        A, Bs, starts = wide(panels)
        grads: list[Tensor | None] = [None] * (4 * len(panels))
        dx = g = None
        for index, (one, B, start, dy) in enumerate(zip(panels, Bs, starts, dys, strict=True)):
            if dy is None:
                continue
            dy = dy.reshape(-1, dy.shape[-1])
            if ctx.needs_input_grad[0]:
                dx = product(dy, one.W.mT, plus=dx)
            if B is not None and h is not None:
                g = dy @ B if g is None else g.addmm_(dy, B)  # (tokens, ranks)
                if ctx.needs_input_grad[4 * index + 4]:
                    grads[4 * index + 3] = (h.mT @ dy)[start : start + len(one.A)].mT  # type: ignore[arg-type]
        if g is not None and A is not None:
            if dx is not None:
                dx.addmm_(g, A)
            if any(ctx.needs_input_grad[4 * index + 3] for index in range(len(panels))):
                dA = g.mT @ x.reshape(-1, x.shape[-1])
                for index, (one, start) in enumerate(zip(panels, starts, strict=True)):
                    if one.A is not None and ctx.needs_input_grad[4 * index + 3]:
                        grads[4 * index + 2] = dA[start : start + len(one.A)]
        return (None if dx is None else dx.view(ctx.shape)), *grads
