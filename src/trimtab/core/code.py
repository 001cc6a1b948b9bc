"""One quantized weight: `Code` holds it, and its product with an input is one opaque operator.

The operator keeps references to the codes for the backward pass and decodes again there; neither the dense weight nor
the input outlives the call, compiled or not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.errors import UserError, listing
from trimtab.core.format import Format
from trimtab.core.product import product, shaped
from trimtab.core.registry import from_json, to_json

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
