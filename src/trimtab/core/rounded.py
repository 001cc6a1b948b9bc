"""A weight that trains while it is kept in eight bits: read by decoding, written by rounding at random.

`Rounded` holds the codes. Its one parameter, `values`, is the weight as everything else sees it: a leaf of shape
(out, in) that asks for a gradient, has one, and can be changed in place, with no memory of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

from trimtab.core.errors import UserError
from trimtab.core.product import product, shaped
from trimtab.core.site import Base, LinearBase
from trimtab.core.transform import wide

GROUP = 256
TOP = 255


class Rounded(nn.Module):
    """A matrix W ≈ q·scale + low with q from 0 to 255, and scale and low for each 256 values in the order of its rows.

    Written anew, every group takes its own smallest and largest value again, and (w − low) / scale is rounded up with
    the probability of its fraction: what is read is w in the mean, so steps much smaller than `scale` add up. Draws
    depend on `turn` alone, which counts on from its start: no generator is moved, and processes that write the same
    values read the same.
    Bytes: 1.03 a value, 8 for `turn`. Costs a draw a value when it is written; a copy of W lives while it is read.
    """

    codes: Tensor
    scale: Tensor
    low: Tensor
    turn: Tensor
    dtype: torch.dtype

    def __init__(self, W: Tensor, turn: Tensor) -> None:
        super().__init__()
        self.shape, self.dtype = W.shape, W.dtype
        groups = in_groups(W.detach())
        low, scale = grid_of(groups)
        self.register_buffer("codes", codes_of(groups, low, scale, 0.5))
        self.register_buffer("scale", scale)
        self.register_buffer("low", low)
        self.register_buffer("turn", turn.detach().clone())
        self.values = nn.Parameter(Values(self, W.shape, W.dtype, W.device))

    def dense(self) -> Tensor:
        """W, without a gradient."""
        groups = self.codes.to(self.low.dtype).mul_(self.scale[:, None]).add_(self.low[:, None])
        return groups.to(self.dtype).view(-1)[: self.shape.numel()].view(self.shape)

    def write(self, W: Tensor) -> None:
        """Keep W from now on."""
        groups = in_groups(W)
        low, scale = grid_of(groups)
        self.codes.copy_(codes_of(groups, low, scale, self.draw(groups)))
        self.low.copy_(low)
        self.scale.copy_(scale)

    def draw(self, like: Tensor) -> Tensor:
        """Numbers from 0 to 1 for the next rounding."""
        if like.is_meta:
            return torch.empty_like(like)
        generator = torch.Generator(like.device).manual_seed(int(self.turn))
        self.turn += 1
        return torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)

    def weight(self) -> Tensor:
        """W, whose gradient is that of `values`."""
        return _Read.apply(self.own(), self)

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ for x (..., in); for backward x is kept, and W decoded again."""
        return _Times.apply(x, self.own(), self)

    def own(self) -> Tensor:
        """`values`, if it still is what reads and writes the codes."""
        if not isinstance(self.values, Values):
            raise UserError(
                f"a weight kept in eight bits was replaced by a {type(self.values).__name__}, as FSDP2 does",
                fix="fully_shard(..., ignored_params={...}) with what trains, which then is whole in every process",
            )
        return self.values

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rounded:
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device))
        for name, held in list(self.named_buffers()):
            moved = fn(held)
            self._buffers[name] = moved if moved.dtype == held.dtype else held.to(moved.device)
        if probe.is_floating_point():
            self.dtype = probe.dtype
        self.renew(self.values.requires_grad)
        return self

    def renew(self, asks: bool) -> None:
        """Make `values` anew where it is of another type or device than what it stands for."""
        asking = self.values.requires_grad == asks
        if not asking or (self.values.dtype, self.values.device) != (self.dtype, self.codes.device):
            self.values = nn.Parameter(Values(self, self.shape, self.dtype, self.codes.device), asks)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "values"]

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *more: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *more)
        missing[:] = [name for name in missing if name != prefix + "values"]

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.dtype}"


class Values(Tensor):
    """The weight that a `Rounded` keeps, as a tensor: reading decodes it, writing in place rounds it.

    What comes of an operation on it is an ordinary tensor.
    """

    owner: Rounded

    @staticmethod
    def __new__(cls, owner: Rounded, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Values:
        made: Values = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device, storage_size=0)
        made.owner = owner
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Values({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].owner, args[0].shape, args[0].dtype, args[0].device)
        read: dict[Rounded, Tensor] = {}

        def dense(one: Values) -> Tensor:
            if one.owner not in read:
                read[one.owner] = one.owner.dense()
            return read[one.owner]

        given = tree_map_only(Values, dense, (list(args), dict(kwargs)))
        found = func(*given[0], **given[1])
        for at, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            written = args[at] if at < len(args) else kwargs.get(argument.name)
            for one in written if isinstance(written, list | tuple) else [written]:
                if isinstance(one, Values):
                    one.owner.write(read[one.owner])
                    found = one if isinstance(found, Tensor) else found
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return remade(copy.deepcopy(self.owner, memo), *self.facts())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return remade, (self.owner, *self.facts())

    def facts(self) -> tuple[Any, ...]:
        """What another one like this has beside its owner, who may still be in the making."""
        return self.shape, self.dtype, self.device, isinstance(self, nn.Parameter) and self.requires_grad


def remade(owner: Rounded, shape: Sequence[int], dtype: torch.dtype, device: torch.device, asks: bool) -> nn.Parameter:
    """The parameter of a copied or pickled `Rounded`."""
    return nn.Parameter(Values(owner, shape, dtype, device), asks)


def kept_in(parameter: Tensor) -> list[Tensor]:
    """The tensors that hold the values of a parameter: itself, but for one whose values are codes."""
    return list(parameter.owner.buffers()) if isinstance(parameter, Values) else [parameter]


def rounded_product(x: Tensor, base: Base, V: Rounded, b: Tensor | None) -> Tensor:
    """The site's product with V (out, in) and b (out) in the place of its own weight and bias."""
    if not isinstance(base, LinearBase):
        return base.affine(x, V.weight().to(x.dtype), b)
    y: Tensor = V(x)
    return y if b is None else y + b


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, owner: Rounded) -> Tensor:
        return owner.dense()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, owner: Rounded) -> Tensor:
        ctx.owner = owner
        ctx.save_for_backward(x)
        W = owner.dense().to(x.dtype)
        return shaped(product(x.reshape(-1, x.shape[-1]), W), (*x.shape[:-1], W.shape[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x,), owner = ctx.saved_tensors, ctx.owner
        g = gradient.reshape(-1, gradient.shape[-1])
        into = product(g, owner.dense().to(g.dtype).mT).view(x.shape) if ctx.needs_input_grad[0] else None
        own = (g.mT @ x.reshape(-1, x.shape[-1])).to(owner.dtype) if ctx.needs_input_grad[1] else None
        return into, own, None


def in_groups(W: Tensor) -> Tensor:
    """W in rows of 256 values, the last one filled up with its last value, in the type steps are computed in."""
    flat = W.to(wide(W.dtype)).reshape(-1)
    missing = -len(flat) % GROUP
    return (torch.cat([flat, flat[-1:].expand(missing)]) if missing else flat).view(-1, GROUP)


def grid_of(groups: Tensor) -> tuple[Tensor, Tensor]:
    """(smallest value, distance between two codes) of every group; 1 where all values are one."""
    low, high = groups.amin(1), groups.amax(1)
    scale = (high - low) / TOP
    return low, torch.where(scale < torch.finfo(scale.dtype).tiny, torch.ones_like(scale), scale)


def codes_of(groups: Tensor, low: Tensor, scale: Tensor, add: Tensor | float) -> Tensor:
    """⌊(w − low) / scale + add⌋: rounded to the nearest with 0.5, at random with draws from 0 to 1."""
    return ((groups - low[:, None]) / scale[:, None]).add_(add).floor_().clamp_(0, TOP).to(torch.uint8)
