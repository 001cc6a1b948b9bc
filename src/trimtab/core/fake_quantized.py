"""Training for few bits: a weight that trains in full and is rounded in every forward pass."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.bits import pack, packed_bytes, unpack
from trimtab.core.errors import UserError
from trimtab.core.method import WeightMethod
from trimtab.core.site import Base, Site

if TYPE_CHECKING:
    from trimtab.core.code import Code


@dataclass(frozen=True)
class FakeQuantized(WeightMethod):
    """Abstract base: W' = (q − zero) scale, with codes q of `code_bits` for groups of `group_size` inputs of V.

    V (out, in), and c (out) where there is a bias, start as copies of W and b and train. Saved are the codes, packed,
    with scale and zero: `trains` is then False, and nothing trains any more.
    """

    laws: ClassVar[Mapping[str, str]] = {
        "identity": "weights are rounded from the first pass on",
        "cost": "the weight trains, so W' itself is built",
    }
    learning_rate: ClassVar[float] = 4e-5
    width_power: ClassVar[float] = 1.0
    replaces: ClassVar[bool] = True

    code_bits: int = 4
    group_size: int | None = None
    trains: bool = True

    def __post_init__(self) -> None:
        if self.code_bits not in (2, 3, 4, 8) or (self.group_size is not None and self.group_size < 1):
            raise UserError(
                f"{type(self).__name__}: code_bits={self.code_bits}, group_size={self.group_size}",
                fix="2, 3, 4 or 8 bits; a group_size that divides the inputs, or none for one group per output",
            )

    @abstractmethod
    def steps(self, W: Tensor) -> dict[str, Any]:
        """What trains beside V, for W in groups (out, groups, group_size)."""

    @abstractmethod
    def rounded(self, V: Tensor, p: Any) -> Tensor:
        """V (out, groups, group_size) rounded, differentiable as the method says."""

    @abstractmethod
    def stored(self, V: Tensor, p: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Codes from 0 (out, groups, group_size), scale and zero (out, groups) of what `rounded` gives."""

    def init(self, site: Site) -> dict[str, Any]:
        W, b = site.base.weight.detach(), site.base.bias
        groups = self.grouped(W)
        if self.trains:
            found = {"V": nn.Parameter(W.clone()), **self.steps(groups)}
            return found if b is None else found | {"c": nn.Parameter(b.detach().clone())}
        empty = torch.zeros(groups.shape[:2], dtype=W.dtype, device=W.device)
        codes = torch.zeros(packed_bytes(W.numel(), self.code_bits), dtype=torch.uint8, device=W.device)
        found = {"codes": codes, "scale": empty, "zero": empty.clone()}
        return found if b is None else found | {"c": b.detach().clone()}

    def count(self, site: Site) -> int:
        if not self.trains:
            return 0
        return site.out_features * (site.in_features + (site.base.bias is not None))

    def grouped(self, W: Tensor) -> Tensor:
        """W (out, in) as (out, groups, group_size)."""
        size = self.group_size or W.shape[-1]
        if W.shape[-1] % size:
            raise UserError(
                f"{type(self).__name__}: group_size={size} does not divide in_features={W.shape[-1]}",
                fix="a group_size that divides it, or none for one group per output",
            )
        return W.unflatten(-1, (-1, size))

    def weight(self, W: Tensor, p: Any) -> Tensor:
        if self.trains:
            return self.rounded(self.grouped(p.V), p).flatten(-2)
        many = p.codes.view(-1, p.codes.shape[-1])  # a stack of experts has a matrix for each
        count = W.shape[-1] * W.shape[-2]
        codes = torch.stack([unpack(one, self.code_bits, count) for one in many]).view(*p.scale.shape, -1)
        return ((codes - p.zero[..., None]) * p.scale[..., None]).view(W.shape)

    def bias(self, b: Tensor | None, p: Any) -> Tensor | None:
        return b if b is None else p.c

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        W = p.V if self.trains else base.weight
        return base.affine(x, self.weight(W, p), self.bias(base.bias, p))

    @torch.no_grad()
    def bake(self, p: Any) -> tuple[FakeQuantized, dict[str, Tensor]] | None:
        if not self.trains:
            return None
        found = self.packed(p)
        c = getattr(p, "c", None)
        return replace(self, trains=False), found if c is None else found | {"c": c.detach()}

    @torch.no_grad()
    def merge(self, code: Code, p: Any) -> dict[str, Tensor] | None:
        """Exactly into affine codes of equal bits and groups; a changed bias is not a code's, so only without one."""
        alike = getattr(code.format, "code_bits", None) == self.code_bits and {"codes", "scale", "zero"} <= {
            *code.names
        }
        if not alike or getattr(p, "c", None) is not None or code.tensors()["scale"].shape[1:] != self.shape_of(p):
            return None
        if not self.trains:
            return {"codes": p.codes, "scale": p.scale, "zero": p.zero}
        return self.packed(p)

    def packed(self, p: Any) -> dict[str, Tensor]:
        """What is saved of the trained weight."""
        codes, scale, zero = self.stored(self.grouped(p.V), p)
        many = codes.to(torch.uint8).flatten(-3).view(-1, codes.shape[-3:].numel())
        streams = torch.stack([pack(one, self.code_bits) for one in many]).view(*codes.shape[:-3], -1)
        return {"codes": streams, "scale": scale, "zero": zero}

    def shape_of(self, p: Any) -> tuple[int, ...]:
        """(groups,) of an output."""
        return tuple(self.grouped(p.V).shape[-2:-1]) if self.trains else tuple(p.scale.shape[-1:])


def straight(x: Tensor) -> Tensor:
    """round(x), with the gradient of x."""
    return x + (x.round() - x).detach()
