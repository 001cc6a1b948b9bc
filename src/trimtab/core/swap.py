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


def swap_alike(module: nn.Module, other: nn.Module) -> None:
    """Give `module` the latest swap of `other`."""
    origin = made(type(other))
    if origin is not None:
        swap(module, origin[1], *origin[2])


def unswap(module: nn.Module) -> None:
    """Undo the latest swap."""
    original = below(type(module))
    module.__class__ = original
    patched = module.__dict__.get("_inner_forward", {})
    if original in patched:
        module.__dict__["forward"] = patched.pop(original)
    if not patched:
        module.__dict__.pop("_inner_forward", None)


def made(cls: type) -> tuple[Any, Callable[..., dict[str, Any]], tuple[Any, ...]] | None:
    """The class that one was made from, its maker and the maker's arguments; None where `subclass` did not make it."""
    return cls._origin if "_origin" in vars(cls) else None  # type: ignore[attr-defined]


def below(cls: type) -> Any:
    """The class that one was made from, or itself."""
    origin = made(cls)
    return cls if origin is None else origin[0]


def original(cls: type) -> Any:
    """The class below every swap."""
    while made(cls) is not None:
        cls = below(cls)
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
    while (origin := made(cls)) is not None:
        cls, maker, args = origin
        chain.append((maker, args))
    return _blank, (cls, tuple(reversed(chain))), self.__dict__


def _blank(cls: type, chain: tuple[tuple[Any, ...], ...]) -> Any:
    for maker, args in chain:
        cls = subclass(cls, maker, *args)
    return object.__new__(cls)
