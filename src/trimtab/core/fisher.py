"""What is measured on a model before a method starts: from gradients of its frozen weights, or from its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.activations import activations
from trimtab.core.errors import UserError, listing
from trimtab.core.hosts import is_raw, raw_weight
from trimtab.core.modes import evaluating
from trimtab.core.places import Place
from trimtab.core.select import select
from trimtab.core.site import is_conv1d

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]
Batches = Iterable[Mapping[str, Any]]


def fisher(
    model: nn.Module, batches: Batches, where: str = "all-linear", *, loss: Loss | None = None
) -> dict[str, Tensor]:
    """F = Σ_n (∂loss_n/∂W)² for every matched weight, as {site name: (out, in) fp32}; arXiv 2111.09839, `label-square`.

    Rows of a batch are taken one by one (a batch gradient squared is not a sum of squares), dropout is off, and the
    model's flags and mode are restored. `loss(model, row)` defaults to `model(**row).loss`. Errors: quantized weights,
    which have no gradient, and no batch at all.
    """
    rows = (row for batch in batches for row in rows_of(batch))
    return summed("fisher", model, rows, where, loss, lambda total, grad: total.addcmul_(grad, grad))


def hardest_fisher(
    model: nn.Module, batches: Batches, where: str = "all-linear", *, loss: Loss | None = None
) -> dict[str, Tensor]:
    """`fisher` of the rows with the highest loss: a tenth of them, at least 3 and at most 25; arXiv 2311.03748."""
    rows = [row for batch in batches for row in rows_of(batch)]
    with evaluating(model), torch.no_grad():
        losses = [float(model(**row).loss if loss is None else loss(model, row)) for row in rows]
    count = min(max(len(rows) // 10, 3), 25)
    hardest = sorted(range(len(rows)), key=lambda n: (-losses[n], n))[:count]
    return fisher(model, [rows[n] for n in hardest], where, loss=loss)


def gradient(
    model: nn.Module, batches: Batches, where: str = "all-linear", *, loss: Loss | None = None
) -> dict[str, Tensor]:
    """G = Σ_n ∂loss_n/∂W over the batches, as {site name: (out, in) fp32}; otherwise as `fisher`."""
    return summed("gradient", model, batches, where, loss, lambda total, grad: total.add_(grad))


def summed(
    verb: str,
    model: nn.Module,
    batches: Batches,
    where: str,
    loss: Loss | None,
    add: Callable[[Tensor, Tensor], object],
) -> dict[str, Tensor]:
    """A sum over batches of something of the gradient of every matched weight."""
    places = select(model, where, kinds={"linear", "embedding", "conv", "raw"})
    owners = [(place, *parameter_of(model, place)) for place in places]
    frozen = [place.name for place, parameter, _ in owners if parameter is None]
    if frozen:
        raise UserError(
            f"{verb}: quantized weights have no gradient: {listing(frozen, 4)}", fix="measure on the dense model"
        )
    chosen = {id(parameter): parameter for _, parameter, _ in owners}
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    sums = {key: torch.zeros_like(parameter, dtype=torch.float32) for key, parameter in chosen.items()}
    seen = 0
    try:
        with evaluating(model):
            for parameter, _ in flags:
                parameter.requires_grad_(id(parameter) in chosen)
            for batch in batches:
                with torch.enable_grad():
                    value = model(**batch).loss if loss is None else loss(model, batch)
                grads = torch.autograd.grad(value, list(chosen.values()), allow_unused=True)
                for key, grad in zip(chosen, grads, strict=True):
                    if grad is not None:
                        add(sums[key], grad.float())
                seen += 1
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    if not seen:
        raise UserError(f"{verb}: no batch was given", fix="pass some hundreds of training rows")
    return {place.name: canonical(sums[id(parameter)], place, turn) for place, parameter, turn in owners}


def covariance(
    model: nn.Module, batches: Batches, where: str = "all-linear", *, loss: Loss | None = None
) -> dict[str, Tensor]:
    """C = mean of x xᵀ over all real tokens, x the input of a matched linear layer, as {site name: (in, in) fp32}.

    The mean is not subtracted. Positions that the attention mask excludes are left out, dropout is off. `loss(model,
    batch)` runs the model; it defaults to `model(**batch)`. Layers with one input (q, k and v) share one matrix.
    Errors: no batch at all.
    """
    places = select(model, where, kinds={"linear"})
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    owner: dict[str, str] = {}
    fresh: dict[str, Tensor] = {}
    real: list[Tensor | None] = [None]

    def note(path: str, args: tuple[Any, ...]) -> None:
        x = args[0].detach()
        owner.setdefault(path, next((other for other, one in fresh.items() if one is args[0]), path))
        if owner[path] != path:
            return
        fresh[path] = args[0]
        mask = real[0]
        rows = x[mask] if mask is not None and mask.shape == x.shape[:-1] else x.reshape(-1, x.shape[-1])
        rows = rows.float()
        sums[path] = sums[path].addmm_(rows.mT, rows) if path in sums else rows.mT @ rows
        counts[path] = counts.get(path, 0) + len(rows)

    paths = dict.fromkeys(place.module for place in places)
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(lambda module, args, path=path: note(path, args))
        for path in paths
    ]
    try:
        with evaluating(model):
            for batch in batches:
                fresh.clear()
                mask = batch.get("attention_mask")
                real[0] = mask.bool() if mask is not None else None
                with torch.no_grad():
                    model(**batch) if loss is None else loss(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    silent = [path for path in paths if not counts.get(owner.get(path, path))]
    if silent:
        raise UserError(f"covariance: no input of {listing(silent, 4)} was seen", fix="pass some training rows")
    done = {path: sums[path] / counts[path] for path in sums}
    return {place.name: done[owner[place.module]] for place in places}


MEASURES: dict[str, Callable[..., dict[str, Tensor]]] = {
    "fisher": fisher,
    "hardest_fisher": hardest_fisher,
    "gradient": gradient,
    "covariance": covariance,
    "activations": activations,
}
"""What `Method.statistics` can name."""


def rows_of(batch: Any) -> list[Any]:
    """The rows of a batch, one by one; a batch that is no mapping is a single row in a form of its own."""
    if not isinstance(batch, Mapping):
        return [batch]
    rows = len(next(iter(batch.values())))
    return [{key: value[n : n + 1] for key, value in batch.items()} for n in range(rows)]


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
    return W if place.rows is None else place.rows.of(W, -2).clone()
