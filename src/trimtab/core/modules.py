"""The modules of a model as tables and guesses of its parts see them: paths, kinds, widths, raw parameters."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator
from typing import Generic

import torch
from torch import Tensor, nn

from trimtab.core.site import is_conv1d


def within(path: str, outer: str) -> bool:
    """Whether a dotted path is `outer` or below it; everything is below the root, ""."""
    return not outer or (path.startswith(outer) and path[len(outer) : len(outer) + 1] in ("", "."))


def join(*names: str) -> str:
    """A dotted path from its non-empty pieces."""
    return ".".join(name for name in names if name)


def walk(module: nn.Module, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) in model order, each module once, leaving out what Trimtab or torch installed on it."""
    seen = set() if seen is None else seen
    if id(module) in seen:
        return
    seen.add(id(module))
    yield path, module
    for name, child in module._modules.items():
        if child is not None and not is_installed(child):
            yield from walk(child, join(path, name), seen)


def is_installed(module: nn.Module) -> bool:
    """Whether a child holds adapters, a quantized record or parametrizations rather than a part of the model."""
    if isinstance(module, torch.nn.utils.parametrize.ParametrizationList):
        return True
    if type(module) is nn.ModuleDict:
        return len(module) > 0 and all(is_installed(child) for child in module.values())
    own = [cls for cls in type(module).__mro__ if cls not in (nn.Module, nn.ModuleDict, object, ABC, Generic)]
    return bool(own) and all(cls.__module__.startswith("trimtab.core.") for cls in own)


def raw_parameter(module: nn.Module, name: str) -> Tensor | None:
    """A parameter by name, seen through a torch parametrization without computing it."""
    parametrized = module._modules.get("parametrizations")
    if parametrized is not None and name in parametrized._modules:
        original = getattr(parametrized._modules[name], "original", None)
        return original if isinstance(original, Tensor) else None
    return module._parameters.get(name)


def parameter_names(module: nn.Module) -> list[str]:
    """Names of a module's own parameters, those under a torch parametrization included."""
    parametrized = module._modules.get("parametrizations")
    return [*module._parameters, *(parametrized._modules if parametrized is not None else ())]


def kind(module: nn.Module) -> str:
    """linear, embedding, conv, norm, or opaque (known by its output only).

    Linear: nn.Linear and its quantized swaps, Conv1D, anything else with a weight and both feature counts. Norm: a
    module without children whose weight is 1-D. Opaque: torch's attention, which reads its weights raw; routers, which
    may be a Linear by class but return their choice of experts; transposed convolutions.
    """
    if any("Router" in cls.__name__ for cls in type(module).__mro__):
        return "opaque"
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "opaque" if isinstance(module, nn.modules.conv._ConvTransposeNd) else "conv"
    weight = raw_parameter(module, "weight")
    packed = module._buffers.get("qweight", module._parameters.get("qweight"))
    matrix = weight if weight is not None else packed
    if matrix is not None and matrix.ndim == 2 and widths(module) is not None:
        return "linear"
    if weight is not None and weight.ndim == 1 and not is_compound(module) and not isinstance(module, nn.PReLU):
        return "norm"
    return "opaque"


def widths(module: nn.Module) -> tuple[int, int] | None:
    """Canonical (out, in) of a linear-like module, without touching its weight; None where it does not say."""
    if is_conv1d(module):
        nx = getattr(module, "nx", None)
        weight = raw_parameter(module, "weight")
        return int(module.nf), int(nx if nx is not None else weight.shape[0])  # type: ignore[arg-type,union-attr]
    out = getattr(module, "out_features", getattr(module, "outfeatures", None))
    into = getattr(module, "in_features", getattr(module, "infeatures", None))
    return (out, into) if isinstance(out, int) and isinstance(into, int) else None


def is_raw_projection(parent: nn.Module | None, name: str) -> bool:
    """Whether this child is a Linear that its parent never calls, but whose weight it reads (torch's attention)."""
    return isinstance(parent, nn.MultiheadAttention) and name == "out_proj"


def is_compound(module: nn.Module) -> bool:
    return any(not is_installed(child) for child in module._modules.values() if child is not None)


def ancestors(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules above a path, outermost first."""
    names = path.split(".")
    return [model.get_submodule(".".join(names[:end])) for end in range(len(names))]
