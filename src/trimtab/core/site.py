"""Site and Base: the one place where layer types, transposition, slices and quantization are known.

A method sees a frozen thing only through `Base`: eight members, the same for a Linear, a GPT-2 Conv1D, the q rows of
a fused projection, an embedding, a convolution, an NF4 weight or another method's edit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from trimtab.core.batch import Batch
    from trimtab.core.code import Code
    from trimtab.core.format import Format
    from trimtab.core.rows import Rows


class Base(ABC):
    """The frozen thing at a site. Canonical orientation everywhere: weights are (out, in), channels are last."""

    __slots__ = ()

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """The frozen output W x + b."""

    @abstractmethod
    def affine(self, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        """Apply any (rows, in) weight the way this site applies its own: lookup, convolution or matrix product."""

    def matmul(self, x: Tensor) -> Tensor:
        """The frozen output without its bias: W x."""
        y, b = self(x), self.bias
        return y if b is None else y - b

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """W (out, in); decoded to dense when it is quantized."""

    @property
    def bias(self) -> Tensor | None:
        """b (out), or None."""
        return None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), without decoding anything."""
        W = self.weight
        return W.shape[0], W.shape[1]

    @property
    def code(self) -> Code | None:
        """The quantized record of W, or None when it is dense."""
        return None

    @property
    def batch(self) -> Batch | None:
        """What is known of the running batch (virtual positions, prompt mask), or None outside a model forward."""
        return None


class ModuleBase(Base):
    """A whole module. `inner` is the forward it had before the edit, patched ones (accelerate) included."""

    __slots__ = ("_batch", "inner", "module")
    module: Any

    def __init__(self, module: nn.Module, inner: Callable[..., Any], batch: Batch | None = None) -> None:
        self.module, self.inner, self._batch = module, inner, batch

    def __call__(self, x: Tensor) -> Tensor:
        return self.inner(x)

    @property
    def batch(self) -> Batch | None:
        return self._batch


class LinearBase(ModuleBase):
    """nn.Linear, dense or quantized: y = x Wᵀ + b."""

    __slots__ = ()

    def affine(self, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        return F.linear(x, W, b)

    def matmul(self, x: Tensor) -> Tensor:
        code = self.code
        return F.linear(x, self.weight) if code is None else code.matmul(x)

    @property
    def weight(self) -> Tensor:
        return self.module.weight

    @property
    def bias(self) -> Tensor | None:
        return self.module.bias

    @property
    def shape(self) -> tuple[int, int]:
        return self.module.out_features, self.module.in_features

    @property
    def code(self) -> Code | None:
        return self.module._modules.get("code")


class Conv1DBase(LinearBase):
    """GPT-2's Conv1D stores Wᵀ: (in, out)."""

    __slots__ = ()

    @property
    def weight(self) -> Tensor:
        code = self.code
        return self.module.weight.mT if code is None else code.dense()

    @property
    def shape(self) -> tuple[int, int]:
        code = self.code
        return tuple(self.module.weight.shape[::-1]) if code is None else code.shape


class EmbeddingBase(ModuleBase):
    """nn.Embedding as a matrix product with one-hot columns: W = Eᵀ (dim, vocabulary), x are ids."""

    __slots__ = ()

    def __call__(self, x: Tensor) -> Tensor:
        return self.inner(x.to(self.module.weight.device))

    def affine(self, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        y = F.embedding(x, W.mT) * self.gain
        return y if b is None else y + b

    @property
    def gain(self) -> float | Tensor:
        """Gemma multiplies what it looks up by a constant; an edit of E must be multiplied too."""
        return getattr(self.module, "embed_scale", 1.0)

    @property
    def weight(self) -> Tensor:
        return self.module.weight.mT


class ConvBase(ModuleBase):
    """nn.Conv1d/2d/3d with one group: W viewed as (out, in·kernel); outputs are shown with channels last."""

    __slots__ = ()

    def __call__(self, x: Tensor) -> Tensor:
        return self.inner(x).movedim(1, -1)

    def affine(self, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        kernel = W.view(W.shape[0], *self.module.weight.shape[1:])
        return self.module._conv_forward(x, kernel, b).movedim(1, -1)

    @property
    def weight(self) -> Tensor:
        return self.module.weight.flatten(1)

    @property
    def bias(self) -> Tensor | None:
        return self.module.bias


class OpaqueBase(ModuleBase):
    """Any other module (a dropout, an MLP, a whole block): only its output is known, and its first one is edited."""

    __slots__ = ("args", "kwargs", "rest", "width")

    def __init__(
        self,
        module: nn.Module,
        inner: Callable[..., Any],
        batch: Batch | None,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        width: int,
    ) -> None:
        super().__init__(module, inner, batch)
        self.args, self.kwargs, self.width = args, kwargs, width
        self.rest: tuple[Any, ...] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        out = self.inner(x, *self.args, **self.kwargs)
        if isinstance(out, tuple):
            self.rest = out[1:]
            return out[0]
        return out

    def affine(self, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        raise TypeError(f"{type(self.module).__name__} has no weight: only hidden-space methods fit here")

    @property
    def weight(self) -> Tensor:
        raise TypeError(f"{type(self.module).__name__} has no weight: only hidden-space methods fit here")

    @property
    def shape(self) -> tuple[int, int]:
        return self.width, self.width


class RawBase(Base):
    """A bare weight and bias (attention's in_proj_weight, a norm, experts' stacked matrices): read, not called."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)

    def affine(self, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        return F.linear(x, W, b)

    @property
    def weight(self) -> Tensor:
        return self._weight

    @property
    def bias(self) -> Tensor | None:
        return self._bias

    @property
    def shape(self) -> tuple[int, int]:
        return self._weight.shape[-2], self._weight.shape[-1]


class Known(Base):
    """Another base restricted to some output rows or batch rows, whose answer for one very `x` is already there."""

    __slots__ = ("_batch", "base", "rows", "x", "y")

    def __init__(
        self,
        base: Base,
        rows: Rows | None,
        x: Tensor | None = None,
        y: Tensor | None = None,
        batch: Batch | None = None,
    ) -> None:
        self.base, self.rows, self.x, self.y = base, rows, x, y
        self._batch = base.batch if batch is None else batch

    def __call__(self, x: Tensor) -> Tensor:
        if x is self.x and self.y is not None:
            return self.y
        y = self.base(x)
        return y if self.rows is None else self.rows.of(y)

    def matmul(self, x: Tensor) -> Tensor:
        if x is self.x:
            return super().matmul(x)
        y = self.base.matmul(x)
        return y if self.rows is None else self.rows.of(y)

    def affine(self, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        return self.base.affine(x, W, b)

    @property
    def weight(self) -> Tensor:
        W = self.base.weight
        return W if self.rows is None else self.rows.of(W, 0)

    @property
    def bias(self) -> Tensor | None:
        b = self.base.bias
        return b if b is None or self.rows is None else self.rows.of(b)

    @property
    def shape(self) -> tuple[int, int]:
        out, width = self.base.shape
        return (out, width) if self.rows is None else (len(self.rows), width)

    @property
    def code(self) -> Code | None:
        return self.base.code if self.rows is None else None

    @property
    def batch(self) -> Batch | None:
        return self._batch


class Edited(Base):
    """A base with a delta on it, whole or on some output rows: what the next stacked method sees as its base."""

    __slots__ = ("base", "delta", "rows")

    def __init__(self, base: Base, delta: Any, rows: Rows | None) -> None:
        self.base, self.delta, self.rows = base, delta, rows

    def __call__(self, x: Tensor) -> Tensor:
        if self.rows is None:
            return self.delta(x, self.base)
        y = self.base(x)
        part = self.delta(x, Known(self.base, self.rows, x, self.rows.of(y)))
        return self.rows.put(y, part)

    def affine(self, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        return self.base.affine(x, W, b)

    @property
    def weight(self) -> Tensor:
        return self.delta.effective(self.base, self.rows)[0]

    @property
    def bias(self) -> Tensor | None:
        return self.delta.effective(self.base, self.rows)[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def batch(self) -> Batch | None:
        return self.base.batch


@dataclass
class Site:
    """One place a method is put at, as `init` sees it."""

    name: str
    """Path of the module, with `:part` for a slice: `transformer.h.0.attn.c_attn:q`."""
    base: Base
    kind: str
    """linear, embedding, conv, norm, attention or opaque."""
    role: str | None = None
    layer: int | None = None
    features: int = 0
    """Width of the residual stream."""
    index: int = 0
    """Position among the sites of this attachment."""
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    """What was measured for this site before `init` (`fisher`: (out, in))."""
    format: Format | None = None
    """What its dense weight is about to be stored in, if it is."""
    takes_bias: bool = True
    """Whether a bias can be put where there is none: not at an RMS norm, nor at a matrix that is read raw."""
    shared: Any = None
    """What `Method.shared` returned, read by attribute."""
    heads: int = 0
    """Query heads of the attention it belongs to, or of the model; 0 where nothing says."""

    @property
    def out_features(self) -> int:
        return self.base.shape[0]

    @property
    def in_features(self) -> int:
        return self.base.shape[1]

    def stored(self, W: Tensor) -> Tensor:
        """What is left of a matrix that went through the site's format."""
        if self.format is None:
            return W
        return self.format.decode(self.format.encode(W), tuple(W.shape)).to(W.dtype)


def is_conv1d(module: nn.Module) -> bool:
    """HF's Conv1D, recognised by what it is made of, so that core imports nothing of transformers."""
    return any(cls.__name__ == "Conv1D" for cls in type(module).__mro__) and hasattr(module, "nf")


def kind_of(module: nn.Module) -> str:
    """linear, embedding, conv, norm (one 1-D weight), attention (torch's own, raw weights) or opaque."""
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.modules.conv._ConvNd) and not isinstance(module, nn.modules.conv._ConvTransposeNd):
        return "conv"
    weight = module._parameters.get("weight")
    alone = set(module._modules) <= {"delta"}
    return "norm" if weight is not None and weight.ndim == 1 and alone else "opaque"
