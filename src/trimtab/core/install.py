"""Installing deltas on a module: class swap where forward is replaced, properties for raw weights, hooks as the last.

Which one is used follows from the host alone, never from the method:

    forward   Linear, Conv1D, Embedding, Conv, and any opaque module: its class's forward calls the deltas
    weight    weights that are read raw (attention's in_proj, 3-D experts, norms, grouped conv): the parameter becomes a
              property that returns the edited weight, while the stored one keeps its name in the state dict
    attention what the queries of an attention module find: `trimtab.core.attention`
    hook      a module whose class cannot change (TorchScript): a forward hook calls the deltas
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.attention import AttentionDeltas, edited_attention
from trimtab.core.batch import follow
from trimtab.core.delta import Cast, Delta, Deltas, State
from trimtab.core.errors import UserError
from trimtab.core.places import Place, Reading
from trimtab.core.rows import Rows
from trimtab.core.site import (
    Base,
    Conv1DBase,
    ConvBase,
    EmbeddingBase,
    LinearBase,
    ModuleBase,
    OpaqueBase,
    RawBase,
    is_conv1d,
    kind_of,
)
from trimtab.core.swap import below, inner_forward, made, swap, unswap

INPUT_NAMES = ("hidden_states", "input", "inputs", "x")


def host_class(module: nn.Module) -> type[ModuleBase] | None:
    """The Base of a module with a weight of its own, or None for an opaque one."""
    if is_conv1d(module):
        return Conv1DBase
    return {"linear": LinearBase, "embedding": EmbeddingBase, "conv": ConvBase}.get(kind_of(module))


# ------------------------------------------------------------------------------------------------ forward replaced


def edited_forward(cls: type) -> dict[str, Any]:
    """Namespace of a subclass of a Linear, Conv1D, Embedding or Conv whose forward goes through its deltas."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        deltas: Any = self.delta
        y = deltas(x, host_class(self)(self, inner_forward(self, cls), deltas.batch))  # type: ignore[misc]
        return y.movedim(-1, 1) if isinstance(self, nn.modules.conv._ConvNd) else y

    return {"forward": forward}


def edited_opaque(cls: type) -> dict[str, Any]:
    """Namespace of a subclass of any module whose first output goes through its deltas (no step of a Sequential)."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run_opaque(self, inner_forward(self, cls), args, kwargs)

    def steps(self: nn.Module) -> Iterator[Any]:
        return (child for name, child in self._modules.items() if name != "delta")

    iterated = {"__iter__": steps, "__len__": lambda self: len(self._modules) - 1}
    return {"forward": forward, **(iterated if issubclass(cls, nn.Sequential) else {})}


def input_name(kwargs: Any) -> str:
    """The keyword under which a module gets what it works on."""
    return next((name for name in INPUT_NAMES if name in kwargs), None) or next(iter(kwargs))


def run_opaque(module: nn.Module, inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call the deltas of an opaque module, passing on all other arguments and outputs."""
    deltas: Any = module.delta
    if deltas.stack in deltas.state.batches:
        follow(deltas.stack, deltas.state, module, args, kwargs)
    if args:
        x, args = args[0], args[1:]
    else:
        name = input_name(kwargs)
        kwargs = dict(kwargs)
        x = kwargs.pop(name)
    base = OpaqueBase(module, inner, deltas.batch, args, kwargs, deltas.width)
    y = deltas(x, base)
    return y if base.rest is None else (y, *base.rest)


def delta_hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """Forward hook for a module whose class cannot change: its output is already known."""
    host = host_class(module)
    deltas: Any = module.delta
    if host is None:
        return run_opaque(module, lambda *_, **__: output, args, kwargs)
    y = deltas(args[0], host(module, lambda _: output, deltas.batch))
    return y.movedim(-1, 1) if isinstance(module, nn.modules.conv._ConvNd) else y


# ------------------------------------------------------------------------------------------------- weight replaced


@dataclass(frozen=True)
class RawWeight:
    """A parameter that is read raw, shown to methods in canonical (out, in) form."""

    name: str
    kind: str
    """matrix, vector (a norm), conv (kernel flattened) or experts (a leading axis of independent matrices)."""
    transposed: bool = False

    @property
    def bias_name(self) -> str | None:
        return self.name.replace("weight", "bias") if "weight" in self.name else f"{self.name}_bias"

    def canonical(self, W: Tensor) -> Tensor:
        W = {"vector": lambda: W[:, None], "conv": lambda: W.flatten(1)}.get(self.kind, lambda: W)()
        return W.mT if self.transposed else W

    def stored(self, W: Tensor, like: Tensor) -> Tensor:
        return (W.mT if self.transposed else W).reshape(like.shape)

    def bias(self, module: nn.Module) -> Tensor | None:
        return module._parameters.get(self.bias_name or "")


def raw_weight(module: nn.Module, place: Place) -> RawWeight:
    """How the parameter of a place is laid out."""
    name = place.parameter or "weight"
    W = module._parameters[name]
    assert W is not None
    kind = "vector" if W.ndim == 1 else "conv" if isinstance(module, nn.modules.conv._ConvNd) else "matrix"
    return RawWeight(name, "experts" if W.ndim == 3 and kind == "matrix" else kind, getattr(place, "transposed", False))


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


# -------------------------------------------------------------------------------------------------- on and off again


def is_raw(module: nn.Module, place: Place) -> bool:
    """Whether a place is edited as a raw weight rather than through its module's forward."""
    grouped = isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1
    return place.parameter is not None or grouped or (kind_of(module) == "norm" and place.kind != "opaque")


def install(module: nn.Module, place: Place, delta: Delta, key: str, state: State, stack: str, width: int) -> None:
    """Add one delta to a module, swapping its class the first time."""
    kind = deltas_class(module, place)
    raw = kind is RawDeltas
    if "delta" not in module._modules:
        if hasattr(module, "delta"):
            raise UserError(f"attach: {place.name} already has an attribute named `delta`")
        deltas = kind(state, stack)
        deltas.__dict__["width"], deltas.__dict__["hook"] = width, None
        module.add_module("delta", deltas)
        try:
            if raw:
                names = [n for n in module._parameters if module._parameters[n] is not None or n.endswith("bias")]
                swap(module, edited_weights, tuple(names))
            elif kind is AttentionDeltas:
                swap(module, edited_attention)
            else:
                swap(module, edited_forward if host_class(module) else edited_opaque)
        except TypeError:
            deltas.__dict__["hook"] = module.register_forward_hook(delta_hook, with_kwargs=True)
    present: Any = module._modules["delta"]
    present.__dict__["stack"] = present.stack or stack  # the first method here may not have wanted one
    if raw:
        present.layouts[key] = raw_weight(module, place)
    present[key] = delta


def listen(model: nn.Module, deltas: Deltas, source: str, reading: Reading) -> None:
    """Tell the deltas of a module what passes by elsewhere in its block; one hook per source."""
    if source in deltas.ears:
        return
    module = model.get_submodule(reading.module)
    if reading.entering:
        hook = partial(hear_input, deltas, source)
        deltas.ears[source] = module.register_forward_pre_hook(hook, with_kwargs=True)
    else:
        deltas.ears[source] = module.register_forward_hook(partial(hear_output, deltas, source, reading.rows))
    deltas.__dict__["sources"] = tuple(deltas.ears)


def hear_input(deltas: Deltas, source: str, module: nn.Module, args: Any, kwargs: Any) -> None:
    """Forward pre-hook: keeps a module's first input for a site further on."""
    deltas.heard[source] = args[0] if args else kwargs[input_name(kwargs)]


def hear_output(deltas: Deltas, source: str, rows: Rows | None, module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook: keeps a module's first output, or rows of it, for a site further on."""
    y = output[0] if isinstance(output, tuple) else output
    deltas.heard[source] = y if rows is None else rows.of(y)


def deltas_class(module: nn.Module, place: Place) -> type[Deltas]:
    """What holds the deltas of a place's module."""
    if place.kind == "attention":
        return AttentionDeltas
    return RawDeltas if is_raw(module, place) else Deltas


def clash(module: nn.Module, place: Place) -> str | None:
    """Why a place cannot take a further delta: its module is already edited another way. None if it can."""
    deltas: Any = module._modules.get("delta")
    if deltas is None or deltas_class(module, place).way == deltas.way:
        return None
    return f"{place.name} is already edited {deltas.way}"


def stand_aside(module: nn.Module) -> None:
    """A hook that does nothing: torch's fused encoder layer then calls its parts instead of reading their weights."""
    deltas: Any = module._modules["delta"]
    if deltas.__dict__.get("guard") is None:
        deltas.__dict__["guard"] = module.register_forward_pre_hook(no_change)


def no_change(module: nn.Module, args: Any) -> None:
    """A forward pre-hook without effect."""


def uninstall(module: nn.Module, adapter: str, gone: Collection[str] | None = None) -> None:
    """Remove one adapter's deltas from a module, or those under the keys `gone`; the last one restores its class."""
    deltas: Any = module._modules["delta"]
    for key, delta in list(deltas.items()):
        if delta.adapter == adapter and (gone is None or key in gone):
            del deltas[key]
            deltas.__dict__.get("layouts", {}).pop(key, None)
    for source in set(deltas.ears) - {delta.method.source for delta in deltas.values()}:
        deltas.ears.pop(source).remove()
    deltas.__dict__["sources"] = tuple(deltas.ears)
    if not len(deltas):
        guard, hook = deltas.__dict__.get("guard"), deltas.__dict__.get("hook")
        if guard is not None:
            guard.remove()
        if hook is not None:
            hook.remove()
        else:
            unswap(module)
        del module._modules["delta"]


def frozen_base(module: nn.Module, place: Place) -> Base:
    """The Base of a module that is called, below any deltas on it."""
    cls: Any = type(module)
    while (origin := made(cls)) is not None and origin[1] is not edited_forward:
        cls = below(cls)
    inner = inner_forward(module, type(module) if origin is None else origin[0])
    host = host_class(module)
    return plain_base(module, place, 0) if host is None else host(module, inner)


def plain_base(module: nn.Module, place: Place, width: int, deltas: Deltas | None = None) -> Base:
    """The Base of a place outside a forward: what `init` and `merge` read."""
    if is_raw(module, place):
        layout = raw_weight(module, place)
        W, b = layout.canonical(module._parameters[layout.name]), layout.bias(module)  # type: ignore[arg-type]
        return RawBase(W, b)
    inner = inner_forward(module, type(module))
    host = host_class(module)
    return OpaqueBase(module, inner, None, (), {}, width) if host is None else host(module, inner)
