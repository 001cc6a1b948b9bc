"""Putting quantized weights into a model and taking them out again: `quantize`, `dequantize`, `rebuild`."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.code import Code
from trimtab.core.errors import UserError, listing
from trimtab.core.format import Format
from trimtab.core.mapped import let_go
from trimtab.core.registry import from_json, to_json
from trimtab.core.site import is_conv1d
from trimtab.core.swap import below, made, subclass


def quantized_linear(cls: type) -> dict[str, Any]:
    """Namespace of a subclass of a linear class whose weight is a `Code`, and reads as the dense matrix on demand."""
    turned = any(base.__name__ == "Conv1D" for base in cls.__mro__)

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.code(x)  # type: ignore[operator]
        bias = self._parameters.get("bias")
        return y if bias is None else y + (bias if bias.dtype == y.dtype else bias.to(y.dtype))

    def weight(self: nn.Module) -> Tensor:
        W = self._modules["code"].dense()  # type: ignore[union-attr,operator]
        return W.mT if turned else W

    return {"forward": forward, "weight": property(weight)}


def quantize(
    model: nn.Module,
    format: Format,
    where: str | Sequence[str] = "all-linear",
    *,
    select: Callable[[nn.Module, Any], Sequence[Any]] | None = None,
) -> nn.Module:
    """Store the weights of the selected linear layers in `format`, in place, one layer at a time; returns the model.

    A place that is a slice of a module (the q rows of a fused projection) stands for the whole module. `all-linear`
    never touches embeddings or the output head, and leaves weights that their module reads raw dense, with a warning.
    `select` replaces the resolver of `where`. Errors, all collected before anything changes: a module that is not a
    plain linear layer, is quantized already, has adapters, or whose weight is tied; a size the format cannot hold; an
    entry that is not finite; a format that needs inputs, which is for `calibrate`.
    """
    chosen = targets(model, format, where, select)
    if format.needs_inputs and not all(dense_weight(module).is_meta for module in chosen.values()):
        name = type(format).__name__
        raise UserError(
            f"quantize: {name} chooses its codes by what the layers see, and no inputs were given",
            fix=f"trimtab.calibrate(model, {name}(...), batches)",
        )
    for module in chosen.values():
        _encode(module, format)
    return model


def targets(
    model: nn.Module,
    format: Format,
    where: str | Sequence[str] = "all-linear",
    select: Callable[[nn.Module, Any], Sequence[Any]] | None = None,
) -> dict[str, nn.Module]:
    """The linear layers that `quantize` would store in `format`, by path; raises what it would raise."""
    if select is None:
        from trimtab.core import select as selection

        select = selection.select
    broad = where == "all-linear" or list(where) == ["all-linear"]
    paths = {place.module: getattr(place, "parameter", None) for place in select(model, where)}
    untouched = _embeddings(model) if broad else []
    chosen: dict[str, nn.Module] = {}
    raw: list[str] = []
    for path, parameter in paths.items():
        module = model.get_submodule(path)
        if any(module is one for one in untouched):
            continue
        if broad and (parameter is not None or not _is_linear(module)):
            raw.append(f"{path}.{parameter}" if parameter else path)
        else:
            chosen[path] = module
    check_modules(model, list(chosen), format)
    if not chosen:
        raise UserError(f"quantize: {where!r} selects no linear layer")
    if raw:
        warnings.warn(f"quantize: {listing(raw, 4)} stay dense: not plain linear layers", stacklevel=3)
    return chosen


def quantize_module(module: nn.Module, format: Format, H: Tensor | None = None) -> nn.Module:
    """Store the weight of one linear layer in `format`, in place; returns it. Errors as in `quantize`.

    `H` (in, in) is the second moment of the layer's inputs, for a format that chooses its codes by it.
    """
    try:
        W = dense_weight(module)
        with torch.no_grad():
            code = Code.of(W, format) if H is None else Code(format, format.encode_for(W, H), W.shape, W.dtype)
    except UserError as error:
        raise UserError(f"quantize: {error.message}", fix=error.fix) from None
    put_code(module, code)
    return module


def check_modules(model: nn.Module, paths: Sequence[str], format: Format) -> None:
    """Raise one error with everything that stands against storing the weights of these modules in `format`."""
    owners = _owners(model)
    problems: list[str] = []
    fixes: dict[str, None] = {}
    for path in dict.fromkeys(paths):
        try:
            _check(model.get_submodule(path), format, owners)
        except UserError as error:
            problems.append(f"{path or 'the model'}: {error.message}")
            fixes.setdefault(error.fix or "leave it out of `where`")
    if problems:
        raise UserError(f"quantize: {listing(problems, 6)}", fix="; ".join(list(fixes)[:3]) or None)


def dequantize(model: nn.Module) -> nn.Module:
    """Put dense, frozen weights back where there are codes; returns the model. What encoding lost stays lost."""
    found = [module for _, module in quantized_modules(model)]
    blocked = [path for path, module in quantized_modules(model) if not _is_outermost(module)]
    if blocked:
        raise UserError(f"dequantize: {listing(blocked, 4)} have adapters", fix="merge or detach them first")
    for module in found:
        dequantize_module(module)
    return model


def dequantize_module(module: nn.Module) -> nn.Module:
    """Put a dense, frozen weight back into one layer; returns it."""
    if not _is_outermost(module):
        problem = "has adapters" if isinstance(module._modules.get("code"), Code) else "is not quantized"
        raise UserError(f"dequantize: the {type(module).__name__} {problem}", fix="merge or detach its adapters first")
    code: Any = module._modules["code"]
    with torch.no_grad():
        W = code.dense()
    swapped = type(module)
    module.__class__ = below(swapped)
    _rebind(module, swapped, type(module))
    del module._modules["code"]
    W = W.mT.contiguous() if is_conv1d(module) else W
    module._parameters = {"weight": nn.Parameter(W, requires_grad=False), **module._parameters}
    return module


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module whose weight is a `Code`, with its path."""
    for path, module in model.named_modules():
        if isinstance(module._modules.get("code"), Code):
            yield path, module


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What is quantized, as plain data: path -> format, shape (out, in), dtype. `rebuild` reads it."""
    found = {}
    for path, module in quantized_modules(model):
        code: Any = module._modules["code"]
        dtype = str(code.dtype).removeprefix("torch.")
        found[path] = {"format": to_json(code.format), "shape": list(code.shape), "dtype": dtype}
    return found


def rebuild(model: nn.Module, description: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Make the described layers of a dense model quantized, their codes undefined: ready to load a state dict into.

    Errors, all collected: a path that is missing or not a plain linear layer; another shape.
    """
    problems: list[str] = []
    plan: list[tuple[nn.Module, Code]] = []
    for path, entry in description.items():
        try:
            module = model.get_submodule(path)
        except AttributeError:
            problems.append(f"{path} does not exist")
            continue
        try:
            W = dense_weight(module)
        except UserError as error:
            problems.append(f"{path}: {error.message}")
            continue
        if list(W.shape) != list(entry["shape"]):
            problems.append(f"{path} has shape {list(W.shape)}, the file {list(entry['shape'])}")
            continue
        dtype = getattr(torch, entry["dtype"])
        plan.append((module, Code.blank(from_json(entry["format"]), entry["shape"], dtype, W.device)))
    if problems:
        raise UserError(f"rebuild: {listing(problems, 6)}", fix="use the model this was saved from")
    for module, code in plan:
        put_code(module, code)
    return model


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _is_outermost(module: nn.Module) -> bool:
    origin = made(type(module))
    return origin is not None and origin[1] is quantized_linear


def dense_weight(module: nn.Module) -> Tensor:
    """The dense weight (out, in) of a plain linear layer, or an error that says why it is not one."""
    name = type(module).__name__
    if isinstance(module._modules.get("code"), Code):
        raise UserError(f"is quantized already ({module.code.format})", fix="dequantize first")  # type: ignore[union-attr]
    if "delta" in module._modules:
        raise UserError("has adapters", fix="quantize before attaching, or detach first")
    if not _is_linear(module):
        raise UserError(f"a {name} is not a linear layer", fix="quantize only Linear and Conv1D layers")
    if "code" in module._modules or hasattr(module, "code"):
        raise UserError("already has an attribute named `code`")
    kind: Any = type(module)
    if not _multiplies(kind):
        raise UserError(f"{name} has a forward of its own, which is not x Wᵀ + b")
    W = module._parameters.get("weight")
    if W is None or W.ndim != 2:
        raise UserError(f"{name} has no plain 2-D weight (a parametrization?)", fix="remove the parametrization first")
    return W.mT if is_conv1d(module) else W


@cache
def _multiplies(cls: Any) -> bool:
    """Whether layers of a class compute x Wᵀ + b: as their parent does, or (Falcon's) tried on a small one."""
    plain = next(one for one in cls.__mro__ if one is nn.Linear or one.__name__ == "Conv1D")
    if cls.forward is plain.forward:
        return True
    if plain is not nn.Linear:
        return False
    generator = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(shape, generator=generator) for shape in ((2, 3, 4), (5, 4), (5,)))
    for bias in (b, None):
        small: Any = cls.__new__(cls)
        nn.Module.__init__(small)
        small.in_features, small.out_features = 4, 5
        small.weight = nn.Parameter(W)
        small.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        try:
            y = small(x)
        except Exception:  # it needs more than a linear layer has
            return False
        if not isinstance(y, Tensor) or y.shape != (2, 3, 5) or not torch.allclose(y, F.linear(x, W, bias), atol=1e-6):
            return False
    return True


def _check(module: nn.Module, format: Format, owners: Mapping[int, int]) -> None:
    """Raise the error that encoding this module would raise, without holding a second copy of its weight for long."""
    W = dense_weight(module)
    if owners.get(id(module._parameters["weight"]), 1) > 1:
        raise UserError("its weight is tied to another module's", fix="leave tied weights dense, or untie them first")
    format.encode(torch.empty(W.shape, dtype=W.dtype, device="meta"))
    if W.is_meta or bool(torch.isfinite(W.sum(dtype=torch.float32))):
        return
    bad = sum(int((~torch.isfinite(rows)).sum()) for rows in W.split(1024))
    if bad:
        raise UserError(f"{bad} of {W.numel()} entries are infinite or NaN", fix="load the checkpoint again")


def _encode(module: nn.Module, format: Format) -> None:
    put_code(module, Code.of(dense_weight(module), format))


def put_code(module: nn.Module, code: Code) -> None:
    plain = type(module)
    module.__class__ = subclass(plain, quantized_linear)
    _rebind(module, plain, type(module))
    dense = module._parameters.pop("weight")
    if dense is not None:
        let_go(dense)
    module._modules["code"] = code.train(module.training)


def _rebind(module: nn.Module, old: type, new: type) -> None:
    """Point bound copies of the old forward, kept by those who patch an instance (accelerate), at the new one."""
    before, after = getattr(old, "forward", None), getattr(new, "forward", None)
    for key, value in list(module.__dict__.items()):
        if isinstance(value, types.MethodType) and value.__self__ is module and value.__func__ is before:
            module.__dict__[key] = types.MethodType(after, module)  # type: ignore[arg-type]


def _owners(model: nn.Module) -> dict[int, int]:
    """How many modules hold each parameter, by its id."""
    count: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                count[id(parameter)] = count.get(id(parameter), 0) + 1
    return count


def _embeddings(model: nn.Module) -> list[nn.Module]:
    """Input embedding and output head, as a transformers model tells them."""
    found = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        getter = getattr(model, name, None)
        if callable(getter):
            try:
                found.append(getter())
            except (AttributeError, NotImplementedError):
                continue
    return [module for module in found if isinstance(module, nn.Module)]
