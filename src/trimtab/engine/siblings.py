"""Linears that read the same input (q, k and v; gate and up), computed at once.

Which ones they are is seen in a trial run, not read off their names. The first one called computes all of them, so the
A factors of their adapters form one panel and their shares of the input's gradient one sum; the others hand out what
is ready if they are called with that very input, and compute for themselves if not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.deltas import Deltas
from trimtab.core.frozen import frozen_weight, low_rank_products
from trimtab.core.low_rank import LowRank
from trimtab.core.modes import evaluating
from trimtab.core.product import Panel
from trimtab.core.site import LinearBase
from trimtab.core.swap import swap, unswap


class Siblings:
    """Linears of one parent that were called with one input; `ready` holds what was computed for `x`."""

    def __init__(self, members: list[nn.Module]) -> None:
        self.members = members
        self.x: Tensor | None = None
        self.version = 0
        self.ready: dict[int, Tensor] = {}

    def output(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """What `module` makes of `x`, or None where it has to compute that itself."""
        if x is not self.x or x._version != self.version or id(module) not in self.ready:
            self.forget()
            panels = [panel_of(member, x) for member in self.members]
            if any(panel is None for panel in panels) or all(panel.A is None for panel in panels if panel):
                return None
            made = low_rank_products(x, [panel for panel in panels if panel is not None])
            self.x, self.version = x, x._version
            self.ready = {id(member): y for member, y in zip(self.members, made, strict=True)}
        y = self.ready.pop(id(module))
        if not self.ready:
            self.forget()
        return y

    def forget(self) -> None:
        """Hold on to nothing."""
        self.x, self.ready = None, {}


def panel_of(module: nn.Module, x: Tensor) -> Panel | None:
    """A linear as it acts on `x` now: frozen, with one low-rank delta on it or none; None if it is anything else."""
    W = frozen_weight(LinearBase(module, module.forward), x)
    if W is None or module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return None
    b, deltas = module._parameters.get("bias"), module._modules.get("delta")
    if deltas is None:
        return Panel(W, b)
    if not isinstance(deltas, Deltas) or deltas.state.rows is not None:
        return None
    active = [delta for delta in deltas.values() if delta.adapter in deltas.state.active]
    if not active:
        return Panel(W, b)
    delta, method = active[0], active[0].method
    plain = isinstance(method, LowRank) and type(method).forward is LowRank.forward
    if len(active) > 1 or delta.rows is not None or not plain or delta._forward_hooks or delta._forward_pre_hooks:
        return None
    if getattr(method, "dropout", 0.0) and delta.training:
        return None
    B, A = method.factors(delta.at(x.dtype), (W.shape[0], W.shape[1]))
    return Panel(W, b, A, B) if A.dtype == B.dtype == W.dtype else None


@contextmanager
def together(model: nn.Module) -> Iterator[list[list[str]]]:
    """Run the model with its sibling linears computed at once; yields their paths."""
    groups = siblings_in(model)
    for group in groups:
        shared = Siblings([model.get_submodule(path) for path in group])
        for member in shared.members:
            member.__dict__["_trimtab_siblings"] = shared
            swap(member, sibling)
    try:
        yield groups
    finally:
        for group in groups:
            for path in group:
                member = model.get_submodule(path)
                unswap(member)
                del member.__dict__["_trimtab_siblings"]


def sibling(cls: type) -> dict[str, Any]:
    """Namespace of a linear that asks its siblings first; it computes the same."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.__dict__["_trimtab_siblings"].output(self, x)
        return cls.forward(self, x) if y is None else y  # type: ignore[attr-defined]

    return {"forward": forward, "_transparent": True}


@torch.no_grad()
def siblings_in(model: nn.Module) -> list[list[str]]:
    """Paths of linears with one parent and one input, at least one of them edited, as a run on three tokens shows."""
    config: Any = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return []
    seen: list[tuple[str, Tensor]] = []
    hooks, linears = [], [(path, one) for path, one in model.named_modules() if isinstance(one, nn.Linear)]
    for path, module in linears:
        hooks.append(module.register_forward_pre_hook(lambda _, args, path=path: seen.append((path, args[0]))))
    try:
        with evaluating(model):
            model(input_ids=torch.tensor([[1, 2, 3]], device=next(model.parameters()).device))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return []
    finally:
        for hook in hooks:
            hook.remove()
    found: dict[tuple[str, int], list[str]] = {}
    for path, x in seen:
        found.setdefault((path.rpartition(".")[0], id(x)), []).append(path)
    edited = {path for path, module in linears if "delta" in module._modules}
    return [group for group in found.values() if len(set(group)) > 1 and edited & set(group)]
