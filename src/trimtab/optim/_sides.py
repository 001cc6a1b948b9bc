"""What projecting transforms share: the smaller side of a matrix, and the way there and back.

A matrix of (rows, columns) with rows >= columns is projected from the right, R = G P; a wider one from the left,
R = Pᵀ G. P is (smaller side, rank), R (larger side, rank) or (rank, larger side).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.transform import Transform, within


def checked(rule: Transform) -> None:
    """Refuse settings that no projection has, and inner transforms that would read a projected weight."""
    within(rule, "rank", 1, float("inf"))
    within(rule, "gap", 1, float("inf"))
    for inner in rule.inners:
        if inner.touches_weight():
            raise UserError(
                f"{type(rule).__name__}: {inner} reads the weight, which is not projected",
                fix="chain what reads the weight behind it, or set weight_decay",
            )


def projects(shape: Sequence[int], rank: int) -> bool:
    """Whether a tensor is a matrix whose smaller side holds `rank` directions."""
    return len(shape) == 2 and rank <= min(shape)


def reduced(shape: Sequence[int], rank: int) -> tuple[int, int]:
    """The shape of R."""
    rows, columns = shape
    return (rows, rank) if rows >= columns else (rank, columns)


def project(G: Tensor, P: Tensor) -> Tensor:
    """R, the gradient in the directions of P."""
    return G @ P if G.shape[0] >= G.shape[1] else P.mT @ G


def back(R: Tensor, P: Tensor, shape: Sequence[int]) -> Tensor:
    """R in the space of the weight."""
    return R @ P.mT if shape[0] >= shape[1] else P @ R


def directions(G: Tensor, rank: int) -> Tensor:
    """The `rank` leading singular vectors of G on its smaller side: (smaller side, rank)."""
    U, _, Vt = torch.linalg.svd(G, full_matrices=False)
    return (Vt[:rank].mT if G.shape[0] >= G.shape[1] else U[:, :rank]).contiguous()
