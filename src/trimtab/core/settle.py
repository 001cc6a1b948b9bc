"""Decisions that a method takes over all its sites together while it trains: new masks, the end of gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from trimtab.core.errors import UserError
from trimtab.core.save import deltas_of
from trimtab.core.state import Part, require_state

Measure = Callable[[Part], Mapping[str, Tensor]]


def settle(model: nn.Module, step: int | None, measure: Measure | None = None) -> list[str]:
    """Let every active part that is due after `step` (None: training is over) decide; returns the labels of those.

    Call it after an optimizer step, before the optimizer forgets what `Method.stale` names, and when no loss of before
    is alive any more: trained tensors may change their shape. `measure(part)` gives the statistics that the part's
    method asks for, by site name.
    """
    state = require_state(model, "settle")
    done = []
    for name in state.active:
        for part in state.adapters[name].parts:
            method = part.method
            if not method.due(step):
                continue
            if method.statistics is not None and measure is None:
                raise UserError(
                    f"settle: {type(method).__name__} wants the {method.statistics} measured again",
                    fix=f"measure=lambda part: trimtab.{method.statistics}(model, batches, part.where)",
                )
            statistics = measure(part) if method.statistics is not None and measure is not None else {}
            names = [place.name for place in part.places]
            sites = dict(zip(names, deltas_of(model, state, name, part), strict=True))
            method.settle(sites, statistics, step)
            done.append(part.label)
            if any(outlived(parameter) for delta in sites.values() for parameter in delta.parameters()):
                raise UserError(
                    "settle: a loss of before is still alive, and its graph knows tensors in their old shape",
                    fix="del loss, after backward and before settle",
                )
    return done


def outlived(parameter: nn.Parameter) -> bool:
    """Whether a graph built before a parameter changed its shape still collects its gradients."""
    if not parameter.requires_grad:
        return False
    known: Any = getattr(get_gradient_edge(parameter).node, "_input_metadata", None)
    return bool(known) and tuple(known[0].shape) != tuple(parameter.shape)
