"""How the module of a place is shown to methods: through its forward, or as a raw weight in canonical form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trimtab.core.places import Place
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
from trimtab.core.swap import below, inner_forward, made


def host_class(module: nn.Module) -> type[ModuleBase] | None:
    """The Base of a module with a weight of its own, or None for an opaque one."""
    if is_conv1d(module):
        return Conv1DBase
    return {"linear": LinearBase, "embedding": EmbeddingBase, "conv": ConvBase}.get(kind_of(module))


def edited_forward(cls: type) -> dict[str, Any]:
    """Namespace of a subclass of a Linear, Conv1D, Embedding or Conv whose forward goes through its deltas."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        deltas: Any = self.delta
        y = deltas(x, host_class(self)(self, inner_forward(self, cls), deltas.batch))  # type: ignore[misc]
        return y.movedim(-1, 1) if isinstance(self, nn.modules.conv._ConvNd) else y

    return {"forward": forward}


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


def is_raw(module: nn.Module, place: Place) -> bool:
    """Whether a place is edited as a raw weight rather than through its module's forward."""
    grouped = isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1
    return place.parameter is not None or grouped or (kind_of(module) == "norm" and place.kind != "opaque")


def plain_base(module: nn.Module, place: Place, width: int) -> Base:
    """The Base of a place outside a forward: what `init` and `merge` read."""
    if is_raw(module, place):
        layout = raw_weight(module, place)
        W, b = layout.canonical(module._parameters[layout.name]), layout.bias(module)  # type: ignore[arg-type]
        return RawBase(W, b)
    inner = inner_forward(module, type(module))
    host = host_class(module)
    return OpaqueBase(module, inner, None, (), {}, width) if host is None else host(module, inner)


def frozen_base(module: nn.Module, place: Place) -> Base:
    """The Base of a module that is called, below any deltas on it."""
    cls: Any = type(module)
    while (origin := made(cls)) is not None and origin[1] is not edited_forward:
        cls = below(cls)
    inner = inner_forward(module, type(module) if origin is None else origin[0])
    host = host_class(module)
    return plain_base(module, place, 0) if host is None else host(module, inner)
