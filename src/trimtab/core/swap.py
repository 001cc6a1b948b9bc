"""Dynamic class swap: a module becomes an instance of a subclass made for it, and back.

Base state-dict keys, hooks and `isinstance` are untouched. The made classes are cached, and their instances pickle and
deep-copy although no module defines the class: they are rebuilt from the original class and the chain of makers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

_made: dict[tuple[Any, ...], type] = {}


def subclass(cls: type, maker: Callable[..., dict[str, Any]], *args: Any) -> type:
    """The subclass of `cls` whose namespace is `maker(cls, *args)`; the same one every time."""
    key = (cls, maker, args)
    if key not in _made:
        namespace = {"__reduce_ex__": _reduce, "_origin": key, "__module__": cls.__module__, **maker(cls, *args)}
        _made[key] = type(cls)(cls.__name__, (cls,), namespace)
    return _made[key]


def swap(module: nn.Module, maker: Callable[..., dict[str, Any]], *args: Any) -> None:
    """Make `module` an instance of its class's subclass; raises TypeError where the class cannot change."""
    original = type(module)
    module.__class__ = subclass(original, maker, *args)
    if "forward" in module.__dict__:
        module.__dict__.setdefault("_inner_forward", {})[original] = module.__dict__.pop("forward")


def unswap(module: nn.Module) -> None:
    """Undo the latest swap."""
    original = type(module)._origin[0]  # type: ignore[attr-defined]
    module.__class__ = original
    patched = module.__dict__.get("_inner_forward", {})
    if original in patched:
        module.__dict__["forward"] = patched.pop(original)
    if not patched:
        module.__dict__.pop("_inner_forward", None)


def original(module: nn.Module) -> type:
    """The class of a module below every swap."""
    cls = type(module)
    while "_origin" in vars(cls):
        cls = cls._origin[0]  # type: ignore[attr-defined]
    return cls


def inner_forward(module: nn.Module, cls: type) -> Callable[..., Any]:
    """The forward below a swap from `cls`: one patched on the instance (accelerate does this), else the class's."""
    patched = module.__dict__.get("_inner_forward")
    if patched is not None and cls in patched:
        return patched[cls]
    return lambda *args, **kwargs: cls.forward(module, *args, **kwargs)  # type: ignore[attr-defined]


def _reduce(self: nn.Module, protocol: Any) -> Any:
    chain: list[tuple[Any, ...]] = []
    cls: Any = type(self)
    while "_origin" in vars(cls):
        original, maker, args = cls._origin
        chain.append((maker, args))
        cls = original
    return _blank, (cls, tuple(reversed(chain))), self.__dict__


def _blank(cls: type, chain: tuple[tuple[Any, ...], ...]) -> Any:
    for maker, args in chain:
        cls = subclass(cls, maker, *args)
    return object.__new__(cls)
