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
from functools import partial
from typing import Any

from torch import nn

from trimtab.core.attention import AttentionDeltas, edited_attention
from trimtab.core.delta import Delta
from trimtab.core.deltas import Deltas
from trimtab.core.errors import UserError
from trimtab.core.hosts import edited_forward, host_class, is_raw, raw_weight
from trimtab.core.places import Place, Reading
from trimtab.core.raw import RawDeltas, edited_weights
from trimtab.core.rows import Rows
from trimtab.core.site import OpaqueBase
from trimtab.core.stack import follow
from trimtab.core.state import State
from trimtab.core.swap import inner_forward, swap, unswap

INPUT_NAMES = ("hidden_states", "input", "inputs", "x")


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
