"""Empirical Fisher information of frozen weights: how much each entry moves the loss, one example at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError, listing
from trimtab.core.install import is_raw, raw_weight
from trimtab.core.select import Place, select
from trimtab.core.site import is_conv1d


def fisher(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    where: str = "all-linear",
    *,
    loss: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None,
) -> dict[str, Tensor]:
    """F = Σ_n (∂loss_n/∂W)² for every matched weight, as {site name: (out, in) fp32}; arXiv 2111.09839, `label-square`.

    Rows of a batch are taken one by one (a batch gradient squared is not a sum of squares), dropout is off, and the
    model's flags and mode are restored. `loss(model, row)` defaults to `model(**row).loss`. Errors: quantized weights,
    which have no gradient, and no batch at all.
    """
    places = select(model, where, kinds={"linear", "embedding", "conv", "raw"})
    owners = [(place, *parameter_of(model, place)) for place in places]
    frozen = [place.name for place, parameter, _ in owners if parameter is None]
    if frozen:
        raise UserError(f"fisher: quantized weights have no gradient: {listing(frozen, 4)}")
    chosen = {id(parameter): parameter for _, parameter, _ in owners}
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    sums = {key: torch.zeros_like(parameter, dtype=torch.float32) for key, parameter in chosen.items()}
    training, seen = model.training, 0
    model.eval()
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) in chosen)
        for batch in batches:
            for row in range(len(next(iter(batch.values())))):
                one = {key: value[row : row + 1] for key, value in batch.items()}
                with torch.enable_grad():
                    value = model(**one).loss if loss is None else loss(model, one)
                grads = torch.autograd.grad(value, list(chosen.values()), allow_unused=True)
                for key, grad in zip(chosen, grads, strict=True):
                    if grad is not None:
                        sums[key].addcmul_(grad.float(), grad.float())
                seen += 1
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        model.train(training)
    if not seen:
        raise UserError("fisher: no batch was given", fix="pass some hundreds of training rows")
    return {place.name: canonical(sums[id(parameter)], place, turn) for place, parameter, turn in owners}


def parameter_of(model: nn.Module, place: Place) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """The stored parameter of a place (None when quantized) and how it is brought to (out, in)."""
    module = model.get_submodule(place.module)
    if is_raw(module, place):
        layout = raw_weight(module, place)
        return module._parameters[layout.name], layout.canonical
    if is_conv1d(module) or isinstance(module, nn.Embedding):
        return module._parameters.get("weight"), lambda W: W.mT
    return module._parameters.get("weight"), lambda W: W.flatten(1)


def canonical(total: Tensor, place: Place, turn: Callable[[Tensor], Tensor]) -> Tensor:
    """A stored-shape tensor as (out, in), cut to the rows of a slice."""
    W = turn(total)
    return W if place.rows is None else W[place.rows[0] : place.rows[1]].clone()
