"""Quantized weights inside a model: `Code` holds one, `quantize` puts them in, `dequantize` takes them out.

The product with a coded weight is one opaque operator. It keeps references to the codes for the backward pass and
decodes again there; neither the dense weight nor the input outlives the call, compiled or not.
"""

from __future__ import annotations

import json
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.errors import UserError, listing
from trimtab.core.format import Format
from trimtab.core.mapped import let_go
from trimtab.core.product import product, shaped
from trimtab.core.registry import find, from_json, to_json
from trimtab.core.rows import Rows
from trimtab.core.site import is_conv1d
from trimtab.core.swap import below, made, subclass

# --------------------------------------------------------------------------------------------------- the operators


class Recipe(NamedTuple):
    """What the operators need to know beside the tensors; travels as `key`, text, which operators can take."""

    format: Format
    names: tuple[str, ...]
    shape: tuple[int, int]
    dtype: torch.dtype


_recipes: dict[str, Recipe] = {}


def _key(recipe: Recipe) -> str:
    cls, kind = type(recipe.format), str(recipe.dtype).removeprefix("torch.")
    key = json.dumps([to_json(recipe.format), recipe.names, recipe.shape, kind, f"{cls.__module__}:{cls.__qualname__}"])
    _recipes[key] = recipe
    return key


def _recipe(key: str) -> Recipe:
    if key not in _recipes:
        format, names, shape, kind, _ = json.loads(key)
        _recipes[key] = Recipe(from_json(format), tuple(names), (shape[0], shape[1]), getattr(torch, kind))
    return _recipes[key]


@cache
def _upcast(kind: str, dtype: torch.dtype) -> bool:
    """Whether a half-precision product is better done in fp32: a CPU without such instructions is up to 60x slower."""
    if kind != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return False
    fast = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return not (hasattr(torch.ops.mkldnn, fast) and getattr(torch.ops.mkldnn, fast)())


@torch.library.custom_op("trimtab::decode", mutates_args=(), schema="(Tensor[] tensors, str key) -> Tensor")
def _decode(tensors: Sequence[Tensor], key: str) -> Tensor:
    W = _decoded(tensors, key)
    return W.clone() if any(W.data_ptr() == tensor.data_ptr() for tensor in tensors) else W


@_decode.register_fake
def _(tensors: Sequence[Tensor], key: str) -> Tensor:
    recipe = _recipe(key)
    return tensors[0].new_empty(recipe.shape, dtype=recipe.dtype)


@torch.library.custom_op(
    "trimtab::product",
    mutates_args=(),
    schema="(Tensor x, Tensor[] tensors, str key, bool transposed) -> Tensor",
)
def _product(x: Tensor, tensors: Sequence[Tensor], key: str, transposed: bool) -> Tensor:
    return _multiplied(x, tensors, key, transposed)


def _multiplied(x: Tensor, tensors: Sequence[Tensor], key: str, transposed: bool) -> Tensor:
    """x Wᵀ, or x W when transposed; each is the other's gradient."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return _multiplied_as_is(x, tensors, key, transposed)
    return _multiplied_as_is(x, tensors, key, transposed)


def _multiplied_as_is(x: Tensor, tensors: Sequence[Tensor], key: str, transposed: bool) -> Tensor:
    """The same without autocast: by the format's own product, if it has one."""
    recipe = _recipe(key)
    own = None
    if not (transposed or x.is_meta):
        own = recipe.format.multiply(x, dict(zip(recipe.names, tensors, strict=True)), recipe.shape)
    return _times(x, _decoded(tensors, key), transposed) if own is None else own


@_product.register_fake
def _(x: Tensor, tensors: Sequence[Tensor], key: str, transposed: bool) -> Tensor:
    out, into = _recipe(key).shape
    return x.new_empty(*x.shape[:-1], into if transposed else out)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, tensors, ctx.key, ctx.transposed = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    tensors = list(ctx.saved_tensors)
    return _product(gradient, tensors, ctx.key, not ctx.transposed), [None] * len(tensors), None, None


_product.register_autograd(_backward, setup_context=_remember)


class _Product(torch.autograd.Function):
    """The same outside compiled graphs: half the cost of a call, and open to `torch.func`."""

    @staticmethod
    def forward(x: Tensor, key: str, transposed: bool, *tensors: Tensor) -> Tensor:
        return _multiplied(x, tensors, key, transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.key, ctx.transposed, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        if torch.is_grad_enabled():
            found = _Product.apply(gradient, ctx.key, not ctx.transposed, *tensors)
        else:
            found = _multiplied(gradient, tensors, ctx.key, not ctx.transposed)
        return found, None, None, *[None] * len(tensors)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, key: str, transposed: bool, *tensors: Tensor) -> tuple[Tensor, int]:
        if any(dim is not None for dim in in_dims[3:]):
            raise NotImplementedError("vmap over the codes of several weights: decode them with `dense` instead")
        return _Product.apply(x.movedim(in_dims[0], 0), key, transposed, *tensors), 0


def _decoded(tensors: Sequence[Tensor], key: str) -> Tensor:
    recipe = _recipe(key)
    return recipe.format.decode(dict(zip(recipe.names, tensors, strict=True)), recipe.shape).to(recipe.dtype)


def _times(x: Tensor, W: Tensor, transposed: bool) -> Tensor:
    W = W.to(x.dtype)
    if _upcast(x.device.type, x.dtype):
        return _times(x.float(), W.float(), transposed).to(x.dtype)
    W = W.mT if transposed else W
    return shaped(product(x.reshape(-1, x.shape[-1]), W), (*x.shape[:-1], W.shape[0]))


# ------------------------------------------------------------------------------------------------------ the record


class Code(nn.Module):
    """One quantized weight (out, in): its format, its encoded tensors as frozen parameters, its original dtype.

    `code(x)` is x Wᵀ; `code.dense()` is W. Scales keep their own dtype when the model is cast; `dtype`, which `dense`
    returns, follows the cast.
    """

    def __init__(self, format: Format, tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.format, self.shape, self.dtype = format, (int(shape[0]), int(shape[1])), dtype
        self.names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))
        self.key = self._make_key()

    @classmethod
    def of(cls, W: Tensor, format: Format) -> Code:
        """Encode a canonical (out, in) matrix."""
        with torch.no_grad():
            return cls(format, format.encode(W), W.shape, W.dtype)

    @classmethod
    def blank(
        cls, format: Format, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "meta"
    ) -> Code:
        """A code of the right sizes with undefined content, to be loaded into."""
        made = cls.of(torch.empty(tuple(shape), dtype=dtype, device="meta"), format)
        return made if torch.device(device).type == "meta" else made.to_empty(device=device)

    def tensors(self) -> dict[str, Tensor]:
        """The encoded tensors by name."""
        return {name: self._parameters[name] for name in self.names}  # type: ignore[misc]

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Code:
        """A code of the same format in which some tensors are replaced; this one is not changed."""
        return Code(self.format, {**self.tensors(), **self._known(tensors)}, self.shape, self.dtype)

    def update(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite some tensors in place, each rounded to its stored dtype."""
        with torch.no_grad():
            for name, tensor in self._known(tensors).items():
                self._parameters[name].copy_(tensor)  # type: ignore[union-attr]

    def dense(self, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """W (out, in) in `dtype`, optionally with some tensors replaced; differentiable in those that ask for it."""
        used = {**self.tensors(), **self._known(tensors or {})}
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in used.values()):
            return self.format.decode(used, self.shape).to(self.dtype)
        return _decode(list(used.values()), self.key)

    def matmul(self, x: Tensor) -> Tensor:
        """x Wᵀ for x (..., in), in the dtype of x (under autocast, in autocast's)."""
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        tensors = list(self.tensors().values())
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return F.linear(x, self.dense().to(x.dtype))
        if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter):
            return _product(x, tensors, self.key, False)
        if torch.is_grad_enabled():
            return _Product.apply(x, self.key, False, *tensors)
        return _multiplied(x, tensors, self.key, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.matmul(x)

    @property
    def nbytes(self) -> int:
        """Bytes stored, measured."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def extra_repr(self) -> str:
        bits = 8 * self.nbytes / (self.shape[0] * self.shape[1])
        return f"{self.format}, shape={self.shape}, {bits:.3f} bits per weight"

    def _known(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        unknown = [name for name in tensors if name not in self.names]
        if unknown:
            name = type(self.format).__name__
            raise UserError(f"{name} has no tensor {listing(unknown)}; it has {listing(self.names)}")
        return tensors

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Code:
        first = self._parameters[self.names[0]]
        probe = fn(torch.empty(0, dtype=self.dtype, device=first.device))  # type: ignore[union-attr]

        def keeping_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keeping_dtype, recurse)
        if probe.dtype != self.dtype and probe.is_floating_point():
            self.dtype = probe.dtype
            self.key = self._make_key()
        return self

    def _make_key(self) -> str:
        return _key(Recipe(self.format, self.names, self.shape, self.dtype))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.key = self._make_key()


# ------------------------------------------------------------------------------------------------- into and out of


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
    if format.needs_inputs and not all(_weight_of(module).is_meta for module in chosen.values()):
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
        W = _weight_of(module)
        with torch.no_grad():
            code = Code.of(W, format) if H is None else Code(format, format.encode_for(W, H), W.shape, W.dtype)
    except UserError as error:
        raise UserError(f"quantize: {error.message}", fix=error.fix) from None
    _install(module, code)
    return module


class Taken(NamedTuple):
    """A product up · down that is taken out of a weight, or of some of its rows, before it is encoded."""

    rows: Rows | None
    up: Tensor
    down: Tensor


def branch_of(taken: Sequence[Taken], out: int) -> tuple[Tensor, Tensor]:
    """All products taken out of one weight as a single one: up (out, ranks) and down (ranks, in)."""
    ups = [up.detach() if rows is None else rows.among(up.detach(), out, 0) for rows, up, _ in taken]
    return torch.cat(ups, 1), torch.cat([one.down.detach() for one in taken])


def with_branch(format: Format, rank: int) -> Format:
    """The format that keeps a high-precision product of a rank beside the codes of `format`."""
    made: Format = find("svdquant", "storage")(inner=format, rank=rank)
    return made


def quantize_without(module: nn.Module, format: Format, taken: Sequence[Taken]) -> nn.Module:
    """Store what is left of a linear weight after some products in `format`, the products beside it; returns it."""
    W = _weight_of(module)
    up, down = branch_of(taken, W.shape[0])
    with torch.no_grad():
        left = (W.double() - up.double() @ down.double()).to(torch.promote_types(W.dtype, torch.float32))
        tensors = {**format.encode(left), "up": up, "down": down}
    _install(module, Code(with_branch(format, up.shape[1]), tensors, W.shape, W.dtype))
    return module


def same_branch(module: nn.Module, format: Format, taken: Sequence[Taken]) -> bool:
    """Whether a layer is stored as `quantize_without` would store it, as far as its code tells."""
    code: Any = module._modules["code"]
    up, down = branch_of(taken, code.shape[0])
    held = code.tensors()
    alike = code.format == with_branch(format, up.shape[1])
    return alike and torch.equal(held["up"], up.to(held["up"])) and torch.equal(held["down"], down.to(held["down"]))


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
            W = _weight_of(module)
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
        _install(module, code)
    return model


# --------------------------------------------------------------------------------------------------------- details


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _is_outermost(module: nn.Module) -> bool:
    origin = made(type(module))
    return origin is not None and origin[1] is quantized_linear


def _weight_of(module: nn.Module) -> Tensor:
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
    W = _weight_of(module)
    if owners.get(id(module._parameters["weight"]), 1) > 1:
        raise UserError("its weight is tied to another module's", fix="leave tied weights dense, or untie them first")
    format.encode(torch.empty(W.shape, dtype=W.dtype, device="meta"))
    if W.is_meta or bool(torch.isfinite(W.sum(dtype=torch.float32))):
        return
    bad = sum(int((~torch.isfinite(rows)).sum()) for rows in W.split(1024))
    if bad:
        raise UserError(f"{bad} of {W.numel()} entries are infinite or NaN", fix="load the checkpoint again")


def _encode(module: nn.Module, format: Format) -> None:
    _install(module, Code.of(_weight_of(module), format))


def _install(module: nn.Module, code: Code) -> None:
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
