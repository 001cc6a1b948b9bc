"""Delta: the one generic module that holds a method's tensors at a site, and what a model knows of its adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import Method, WeightMethod
from trimtab.core.rows import Rows
from trimtab.core.site import Base, Known


class Group(nn.Module):
    """A dict of tensors as a module: a Parameter trains, a plain tensor is fixed, a Module is a body, a dict nests."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        super().__init__()
        for name, value in tensors.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            elif isinstance(value, Tensor):
                self.register_buffer(name, value)
            elif isinstance(value, nn.Module):
                self.add_module(name, value)
            else:
                self.add_module(name, Group(value))


class Cast:
    """A group read in another floating type: fp32 master parameters beside a bf16 model, cast where they are used."""

    def __init__(self, group: Any, dtype: torch.dtype) -> None:
        self._group, self._dtype = group, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._group, name)
        if isinstance(value, Tensor):
            return value.to(self._dtype) if value.is_floating_point() else value
        return Cast(value, self._dtype) if isinstance(value, Group) else value


class Delta(Group):
    """A method's tensors at one site; called as `delta(x, base)`, so that sharding and other hooks on it fire."""

    def __init__(
        self,
        method: Method,
        tensors: Mapping[str, Any],
        *,
        adapter: str,
        slot: str,
        rows: Rows | None = None,
    ) -> None:
        super().__init__(tensors)
        self.method, self.adapter, self.slot, self.rows = method, adapter, slot, rows
        self.master = False
        self.share(None)

    def share(self, group: Group | None) -> None:
        """Point `p.shared` at tensors that live at the root of the model, without owning them."""
        for module in self.modules():
            if isinstance(module, Group):
                module.__dict__["shared"] = group

    def at(self, dtype: torch.dtype) -> Any:
        """These tensors as the method reads them: themselves, or cast when they are kept in a wider type."""
        return Cast(self, dtype) if self.master else self

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if not self.master:
            return self.method.forward(x, base, self)
        return self.method.forward(x, base, self.at(x.dtype if x.is_floating_point() else base.weight.dtype))

    def effective(self, base: Base, rows: Rows | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the whole base with this delta applied (to `rows` of it only, for a slice)."""
        method = self.method
        if not isinstance(method, WeightMethod):
            raise UserError(f"{type(method).__name__} edits activations: a site under it has no single weight")
        part = base if rows is None else Known(base, rows)
        W, b = part.weight, part.bias
        p = Cast(self, W.dtype)
        new_W, new_b = method.weight(W, p), method.bias(b, p)
        if rows is None:
            return new_W, new_b
        whole_b = base.bias
        if whole_b is None and new_b is not None:
            whole_b = new_b.new_zeros(base.shape[0])
        new_b = whole_b if whole_b is None or new_b is None else rows.put(whole_b, new_b)
        return rows.put(base.weight, new_W, 0), new_b

    def extra_repr(self) -> str:
        return repr(self.method)


def build(tensors: Mapping[str, Any], *, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The tensors of `init` with their floating members in `dtype` on `device`; nesting is kept."""
    done: dict[str, Any] = {}
    for name, value in tensors.items():
        if isinstance(value, nn.Module):
            done[name] = value.to(device=device, dtype=dtype)
        elif isinstance(value, Tensor):
            moved = value.detach().to(device=device, dtype=dtype if value.is_floating_point() else value.dtype)
            done[name] = nn.Parameter(moved, value.requires_grad) if isinstance(value, nn.Parameter) else moved
        else:
            done[name] = build(value, dtype=dtype, device=device)
    return done
