"""An attention as a site: what its queries find is edited, behind rotation and before the output projection.

The edited module runs as it is; while it does, its call of torch's `scaled_dot_product_attention` goes through the
deltas. So whatever the model does to q and k (rotation, norms, a cache, groups, packing) is done already, and masks do
not matter: x are the queries (rows, heads, tokens, size) as they meet the keys, base(x) what they find.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trimtab.core.deltas import Deltas
from trimtab.core.errors import UserError
from trimtab.core.hosts import frozen_base, plain_base
from trimtab.core.places import Place
from trimtab.core.site import Base, ModuleBase
from trimtab.core.state import State
from trimtab.core.swap import inner_forward

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
"""What modules and configs call their number of query heads."""
_running: list[Any] = []
"""The `Calls` of edited attentions that run now, innermost last."""


class AttentionBase(ModuleBase):
    """One attention of a running forward: base(x) is what the queries x find at the model's own keys and values."""

    __slots__ = ("beside", "scale")

    def __init__(self, module: nn.Module, inner: Callable[..., Any], deltas: AttentionDeltas, scale: float) -> None:
        super().__init__(module, inner, deltas.batch)
        self.beside, self.scale = deltas.beside, scale

    def affine(self, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        raise TypeError("an attention has no weight of its own")

    @property
    def weight(self) -> Tensor:
        raise TypeError("an attention has no weight of its own")


def at_prompt(base: Base, P: Tensor, x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Keys and values (heads, length, size) that the frozen projections make of P (length, width), and the scale.

    A prompt has no position, so its keys are not rotated; a norm on keys applies to them.
    """
    inner: Any = base
    while not isinstance(inner, AttentionBase):
        inner = inner.base
    heads, size, made = x.shape[1], x.shape[3], []
    for role in ("k", "v"):
        place = inner.beside[role]
        y = frozen_base(inner.module.get_submodule(place.module), place)(P[None])[0]
        y = y if place.rows is None else place.rows.of(y)
        norm = inner.module._modules.get(f"{role}_norm")
        whole = norm is not None and next(norm.parameters()).shape[0] == y.shape[1]
        y = norm(y) if whole else y
        groups = (inner.beside["k"].features or size) // size
        y = y.reshape(len(P), groups, -1).transpose(0, 1)
        y = y if norm is None or whole else norm(y)
        made.append(y.repeat_interleave(heads // groups, 0))
    return made[0], made[1], inner.scale


class AttentionDeltas(Deltas):
    """The deltas on one attention."""

    way: ClassVar[str] = "in its attention"
    beside: Mapping[str, Place]
    """The projections k and v: paths from the attention module, `features` their widths."""
    heads: int

    def __init__(self, state: State, stack: str) -> None:
        super().__init__(state, stack)
        self.__dict__["beside"], self.__dict__["heads"] = {}, 0

    def used(self) -> bool:
        """Whether the running batch uses one of these deltas."""
        names = self.state.active if self.state.rows is None else [name for row in self.state.rows for name in row]
        return any(delta.adapter in names for delta in self.values())


class Calls(TorchFunctionMode):
    """Context in which torch's attention goes through the deltas of a module."""

    def __init__(self, module: nn.Module, deltas: AttentionDeltas) -> None:
        super().__init__()
        self.module, self.deltas, self.seen, self.busy = module, deltas, 0, False

    def __enter__(self) -> Any:
        _running.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _running.pop()
        super().__exit__(*error)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if function is not F.scaled_dot_product_attention or self.busy:
            return function(*args, **given)
        query, *rest = args or (given.pop("query"),)
        return self.edit(query, lambda q: function(q, *rest, **given), given.get("scale"))

    def edit(self, query: Tensor, attend: Callable[[Tensor], Tensor], scale: float | None) -> Tensor:
        """What queries find, edited. The heads of a single query may come grouped by the keys they share."""
        self.seen += 1
        shape, was = query.shape, self.busy
        x = query.reshape(shape[0], self.deltas.heads, -1, shape[-1])

        def inner(q: Tensor) -> Tensor:
            return attend(q.reshape(shape)).reshape(*q.shape[:-1], -1)

        base = AttentionBase(self.module, inner, self.deltas, shape[-1] ** -0.5 if scale is None else scale)
        self.busy = True
        try:
            return self.deltas(x, base).reshape(*shape[:-1], -1)
        finally:
            self.busy = was


def attention(query: Tensor, attend: Callable[[Tensor], Tensor], scale: float | None) -> Tensor:
    """`attend(query)` as the running module's deltas edit it; for functions that call torch's attention in pieces."""
    edited = bool(_running) and not _running[-1].busy
    return _running[-1].edit(query, attend, scale) if edited else attend(query)


def edited_attention(cls: type) -> dict[str, Any]:
    """Namespace of a subclass of an attention module whose queries' findings go through its deltas."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inner, deltas = inner_forward(self, cls), self.delta
        if not deltas.used():  # type: ignore[union-attr,operator]
            return inner(*args, **kwargs)
        with Calls(self, deltas) as calls:  # type: ignore[arg-type]
            out = inner(*args, **kwargs)
        if not calls.seen:
            raise UserError(
                f"forward: {type(self).__name__} calls no scaled_dot_product_attention of torch, where it is edited",
                fix='model.set_attn_implementation("sdpa") where the model has it; else prefix_tuning, or others',
            )
        return out

    return {"forward": forward}


def heads_of(module: nn.Module) -> int:
    """Number of query heads of an attention module, by itself or by its config."""
    sources = (module, getattr(module, "config", None))
    found = (getattr(source, name, None) for source in sources for name in HEADS)
    heads = next((value for value in found if isinstance(value, int)), None)
    if heads is None:
        raise UserError(f"attach: {type(module).__name__} does not say how many heads it has")
    return heads


def projections(places: Sequence[Place], module: nn.Module, path: str) -> dict[str, Place]:
    """k and v of the attention at `path`, seen from it; `features` is how wide each is."""
    found: dict[str, Place] = {}
    for place in places:
        if place.role in ("k", "v") and place.module.startswith(f"{path}.") and place.kind == "linear":
            inner = place.module[len(path) + 1 :]
            wide = plain_base(module.get_submodule(inner), Place(inner), 0).shape[0]
            width = wide if place.rows is None else len(place.rows)
            found.setdefault(place.role, Place(inner, rows=place.rows, features=width))
    return found
