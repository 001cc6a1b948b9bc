"""Deltas on parameters that are read raw (attention's in_proj, 3-D experts, norms): the parameter becomes a property.

The property returns the edited weight, computed once per forward of its module, while the stored one keeps its name in
the state dict.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.delta import Cast, Delta
from trimtab.core.deltas import Deltas
from trimtab.core.errors import UserError
from trimtab.core.hosts import RawWeight
from trimtab.core.rows import Rows
from trimtab.core.site import RawBase
from trimtab.core.state import State
from trimtab.core.swap import inner_forward


class RawDeltas(Deltas):
    """Deltas on raw weights: computes the edited parameters, once per forward of their module."""

    way: ClassVar[str] = "as a raw weight"
    layouts: dict[str, RawWeight]
    ready: dict[str, Tensor | None]

    def __init__(self, state: State, stack: str) -> None:
        super().__init__(state, stack)
        self.__dict__["layouts"], self.__dict__["ready"] = {}, {}

    def names(self) -> list[str]:
        """The parameters these deltas may change, biases included."""
        return [name for layout in self.layouts.values() for name in (layout.name, layout.bias_name) if name]

    def value(self, module: nn.Module, name: str) -> Tensor | None:
        """The edited parameter `name` of `module`; the stored one while it is sharded, which its owner asks for."""
        stored = module._parameters.get(name)
        if name not in self.ready and hasattr(stored, "full_tensor"):
            return stored
        if name not in self.ready:
            for layout in dict.fromkeys(self.layouts.values()):
                if name in (layout.name, layout.bias_name):
                    return self.compute(module, layout)[name]
        return self.ready[name]

    def compute(self, module: nn.Module, layout: RawWeight) -> dict[str, Tensor | None]:
        """The edited weight and bias of one layout."""
        rows = self.state.rows
        if rows is not None and any(delta.adapter in names for delta in self.values() for names in rows):
            raise UserError(
                f"activate: {type(module).__name__} reads its weights raw, so its rows cannot use different adapters",
                fix="activate one adapter for all rows, or leave these modules out of `where`",
            )
        stored, b = module._parameters[layout.name], layout.bias(module)
        assert stored is not None
        W = layout.canonical(stored)
        for key, delta in self.items():
            if rows is None and self.layouts[key] == layout and delta.adapter in self.state.active:
                W, b = edit_raw(delta, W, b, layout)  # type: ignore[arg-type]
        return {layout.name: layout.stored(W, stored), layout.bias_name or "": b}

    def run(self, module: nn.Module, inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """`inner` with every edited parameter computed once."""
        for layout in dict.fromkeys(self.layouts.values()):
            self.ready.update(self.compute(module, layout))
        try:
            return inner(*args, **kwargs)
        finally:
            self.ready.clear()


def edit_raw(delta: Delta, W: Tensor, b: Tensor | None, layout: RawWeight) -> tuple[Tensor, Tensor | None]:
    """One delta on a canonical weight; a stack of expert matrices is edited matrix by matrix."""
    if layout.kind != "experts":
        return delta.effective(RawBase(W, b), delta.rows)
    rows = delta.rows or Rows(0, W.shape[1])
    fields = dict(delta.named_parameters()) | dict(delta.named_buffers())
    fields = {key: value.to(W.dtype) if value.is_floating_point() else value for key, value in fields.items()}
    method: Any = delta.method
    shared = Cast(delta, W.dtype).shared
    part = torch.func.vmap(lambda w, p: method.weight(w, Fields(p, shared)))(rows.of(W, 1), fields)
    if b is not None:
        c = torch.func.vmap(lambda c, p: method.bias(c, Fields(p, shared)))(rows.of(b, 1), fields)
        b = rows.put(b, c, 1)
    return rows.put(W, part, 1), b


class Fields:
    """Tensors by dotted name, read by attribute as a Group is; `shared` is what all sites use together."""

    def __init__(self, tensors: dict[str, Tensor], shared: Any = None) -> None:
        self._tensors, self.shared = tensors, shared

    def __getattr__(self, name: str) -> Any:
        if name in self._tensors:
            return self._tensors[name]
        inner = {key[len(name) + 1 :]: value for key, value in self._tensors.items() if key.startswith(name + ".")}
        if not inner:
            raise AttributeError(name)
        return Fields(inner, self.shared)


def edited_weights(cls: type, names: tuple[str, ...]) -> dict[str, Any]:
    """Namespace of a subclass in which these parameters are properties returning their edited value."""

    def parameter(name: str) -> property:
        return property(
            lambda self: self.delta.value(self, name) if name in self.delta.names() else self._parameters[name]
        )

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.delta.run(self, inner_forward(self, cls), args, kwargs)  # type: ignore[union-attr,operator]

    return {"forward": forward, **{name: parameter(name) for name in names}}
