"""Pruning: set the least wanted entries of weights to zero, before a little of the model is trained again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError, listing
from trimtab.core.fisher import parameter_of
from trimtab.core.places import Place
from trimtab.core.select import select


def prune(
    model: nn.Module,
    sparsity: float = 0.5,
    where: str = "all-linear",
    *,
    covariance: Mapping[str, Tensor] | None = None,
    of: int | None = None,
) -> nn.Module:
    """Zero the `sparsity` share of entries of every matched weight that score lowest, in place; returns the model.

    Without `covariance` the score is |W|, compared over the whole matrix (magnitude pruning). With the covariances of
    the inputs (`trimtab.covariance`) it is |W_ij|·√C_jj, compared within each output row (Wanda, arXiv 2306.11695).
    With `of`, entries compete only among that many neighbouring inputs: `sparsity=0.5, of=4` is the 2:4 pattern. The
    output head is no part of `all-linear`. Exactly ⌊sparsity·size⌋ entries go in each group, zeros of before first.
    Wanda's official code prunes layer by layer and measures the next one's inputs behind pruned layers: call this with
    `where="all-linear@0"`, measure again, and so on. Errors, all before anything changes: quantized weights, weights
    with adapters, sites without a covariance, inputs that `of` does not divide.
    """
    if not 0 <= sparsity < 1 or (of is not None and of < 1):
        raise UserError(f"prune: sparsity={sparsity!r}, of={of!r}", fix="a share of 0 or more and below 1; of=4")
    places = select(model, where, kinds={"linear", "conv", "raw"})
    problems = [problem for place in places if (problem := unfit(model, place, covariance, of))]
    if problems:
        raise UserError(f"prune: {listing(problems, 4)}", fix="prune a dense model, before anything is attached")
    with torch.no_grad():
        for place in places:
            W, rows = weight_of(model, place), place.rows
            score = W.abs() if rows is None else rows.of(W.abs(), -2)
            if covariance is not None:
                score = score * covariance[place.name].diagonal().sqrt().to(W)
            drop = lowest(score, sparsity, covariance is not None, of)
            W.masked_fill_(drop if rows is None else rows.among(drop, W.shape[-2], -2), 0)
    return model


def weight_of(model: nn.Module, place: Place) -> Tensor:
    """A view (..., out, in) of the stored weight that a place is, or is some rows of."""
    parameter, canonical = parameter_of(model, place)
    W: Tensor = canonical(parameter.detach())
    return W


def lowest(score: Tensor, sparsity: float, by_row: bool, of: int | None) -> Tensor:
    """Where the `sparsity` share of the lowest scores of each group is, as booleans."""
    size = of or score.shape[-1]
    groups = score.reshape(-1, size) if by_row or of else score.reshape(*score.shape[:-2], -1)
    drop = groups.topk(int(sparsity * groups.shape[-1]), dim=-1, largest=False).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, drop, True).view(score.shape)


def unfit(model: nn.Module, place: Place, covariance: Mapping[str, Tensor] | None, of: int | None) -> str | None:
    """Why the weight of a place cannot be pruned, or None."""
    module = model.get_submodule(place.module)
    if "delta" in module._modules:
        return f"{place.name} has adapters"
    if parameter_of(model, place)[0] is None:
        return f"{place.name} is quantized"
    if covariance is not None and place.name not in covariance:
        return f"{place.name} has no covariance"
    into = weight_of(model, place).shape[-1]
    return f"{place.name} has {into} inputs, no multiple of {of}" if of and into % of else None
