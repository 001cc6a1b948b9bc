"""Any low-rank adapter as a plain LoRA on the weights that are there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.attach import SHARED
from trimtab.core.delta import Cast, Delta
from trimtab.core.draw import site_at
from trimtab.core.errors import UserError, listing
from trimtab.core.low_rank import LowRank
from trimtab.core.raw import Fields
from trimtab.core.registry import find
from trimtab.core.save import deltas_of
from trimtab.core.site import Base, RawBase
from trimtab.core.stack import slot_name
from trimtab.core.state import Part, State, check_names, require_state


def as_lora(model: nn.Module, name: str = "default") -> nn.Module:
    """Turn an adapter whose change is a product B A into a plain LoRA, exactly and in place; returns the model.

    W' = W + B A with every scale inside B: one that starts from a part of W (PiSSA) gets twice its rank, [B, −B0] and
    [A; A0], and no longer needs W0. On codes it is exact for the weight these decode to. The result trains on as LoRA.
    Errors: a method that is not of this form; nothing is changed then.
    """
    state = require_state(model, "as_lora")
    check_names(state, [name], "as_lora")
    adapter = state.adapters[name]
    others = [type(part.method).__name__ for part in adapter.parts if not isinstance(part.method, LowRank)]
    if others:
        raise UserError(
            f"as_lora: the change of {listing(others)} is no product of two factors",
            fix="keep it as it is, or trimtab.merge(model)",
        )
    shared: Any = model._modules.get(SHARED, {})
    parts = []
    for part in adapter.parts:
        olds = deltas_of(model, state, name, part)
        bases = [site_at(model, State(), place).base for place in part.places]
        work = [(old, *factors_of(old, base)) for old, base in zip(olds, bases, strict=True)]
        method = plain_lora(part, [A.shape[-2] for _, _, A in work])
        for place, (old, B, A) in zip(part.places, work, strict=True):
            trains = any(parameter.requires_grad for parameter in old.parameters())
            tensors = {"A": nn.Parameter(A, trains), "B": nn.Parameter(B, trains)}
            new = Delta(method, tensors, adapter=name, slot=old.slot, rows=old.rows)
            new.master = old.master
            deltas: Any = model.get_submodule(place.module)._modules["delta"]
            key = next(key for key, delta in deltas.items() if delta is old)
            deltas[key] = new.train(old.training)
        slot = slot_name(name, part.label)
        if slot in shared:
            del shared[slot]
        parts.append(Part(method, part.where, part.label, part.places))
    if SHARED in model._modules and not len(shared):
        del model._modules[SHARED]
    adapter.parts[:] = parts
    return model


def factors_of(delta: Delta, base: Base) -> tuple[Tensor, Tensor]:
    """B (out, k) and A (k, in) of a delta as tensors of their own, computed in fp32 at least and rounded once."""
    method: Any = delta.method
    kept = {key: value.detach() for key, value in delta.state_dict().items()}
    first = next(value for value in kept.values() if value.is_floating_point())
    kind = torch.promote_types(first.dtype, torch.float32)
    with torch.no_grad():
        if isinstance(base, RawBase) and base.weight.ndim == 3:  # a stack of matrices
            wide = {key: value.to(kind) if value.is_floating_point() else value for key, value in kept.items()}
            shared = Cast(delta, kind).shared
            B, A = torch.func.vmap(lambda p: method.factors(Fields(p, shared), base.shape))(wide)
        else:
            B, A = method.factors(Cast(delta, kind), base.shape)
        return B.to(first.dtype, copy=True).contiguous(), A.to(first.dtype, copy=True).contiguous()


def plain_lora(part: Part, ranks: list[int]) -> LowRank:
    """LoRA with s = 1 and these ranks at the places of a part."""
    rate = float(getattr(part.method, "dropout", 0.0))
    usual = max(set(ranks), key=ranks.count)
    odd = ", ".join(f"{place.name}={rank}" for place, rank in zip(part.places, ranks, strict=True) if rank != usual)
    one = {"alpha": float(usual)} if not odd else {"alpha": 1.0, "rank_power": 0.0, "ranks": odd}
    made: LowRank = find("lora")(rank=usual, dropout=rate, **one)
    return made
