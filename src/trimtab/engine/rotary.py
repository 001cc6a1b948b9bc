"""Rotary positions turned in place of copied: the same numbers with a third of the passes over queries and keys.

    y₁ = x₁ cos₁ − x₂ sin₁,   y₂ = x₂ cos₂ + x₁ sin₂        (x₁ and x₂ the halves of the last axis)

Decoders call a function of their module for this, all of nearly the same text. It is replaced where a trial shows that
it computes just that, and called itself for whatever else it is given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NAME = "apply_rotary_pos_emb"
Rotary = Callable[..., tuple[Tensor, Tensor]]


def turned(x: Tensor, cos: Tensor, first: Tensor, second: Tensor, sign: int) -> Tensor:
    """(x₁ cos₁ ∓ x₂ first, x₂ cos₂ ± x₁ second); x and cos (..., width), first and second (..., width/2)."""
    half = x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], first, value=-sign)
    y[..., half:].addcmul_(x[..., :half], second, value=sign)
    return y


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        first, second = sin.chunk(2, -1)
        return turned(q, cos, first, second, 1), turned(k, cos, first, second, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, -1)  # turned back: the halves change places, and the sign
        return turned(dq, cos, second, first, -1), turned(dk, cos, second, first, -1), None, None


def quick_rotary(own: Rotary) -> Rotary:
    """The fast version of a module's function, which it calls itself where the tensors are not plain ones."""

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        plain = not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())
        alike = q.shape[-1] == k.shape[-1] == cos.shape[-1] == sin.shape[-1] and not q.shape[-1] % 2
        if not (plain and alike and q.dtype == k.dtype == cos.dtype == sin.dtype) or cos.requires_grad:
            return own(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        return _Turned.apply(q, k, cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim))

    return rotary


@contextmanager
def turning(model: nn.Module) -> Iterator[list[str]]:
    """Rotary positions by the fast version inside; yields the names of the modules whose function was replaced."""
    before: list[tuple[dict[str, Any], Rotary]] = []
    try:
        for scope in scopes(model):
            own = scope[NAME]
            if behaves(own):
                before.append((scope, own))
                scope[NAME] = quick_rotary(own)
        yield [scope["__name__"] for scope, _ in before]
    finally:
        for scope, own in before:
            scope[NAME] = own


def scopes(model: nn.Module) -> list[dict[str, Any]]:
    """The global names of every Python module whose layers are in the model and that turns queries and keys."""
    found: dict[int, dict[str, Any]] = {}
    for cls in {cls for module in model.modules() for cls in type(module).__mro__ if "forward" in vars(cls)}:
        scope = getattr(inspect.unwrap(vars(cls)["forward"]), "__globals__", {})
        if callable(scope.get(NAME)):
            found[id(scope)] = scope
    return list(found.values())


@torch.no_grad()
def behaves(own: Rotary) -> bool:
    """Whether a function turns as above, told by a few numbers."""
    draw = torch.Generator().manual_seed(0)
    q, k, cos, sin = (
        torch.randn(shape, generator=draw) for shape in ((1, 3, 2, 8), (1, 1, 2, 8), (1, 2, 8), (1, 2, 8))
    )
    try:
        theirs = own(q, k, cos, sin, unsqueeze_dim=1)
        ours = quick_rotary(own)(q, k, cos, sin)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
    same = [torch.is_tensor(one) and one.shape == other.shape for one, other in zip(theirs, ours, strict=False)]
    return same == [True, True] and all(torch.allclose(*pair, 0, 1e-5) for pair in zip(theirs, ours, strict=True))
