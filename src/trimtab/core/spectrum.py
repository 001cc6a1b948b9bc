"""Decompositions that depend on nothing but the matrix: no random state, no library's choice of sign."""

from __future__ import annotations

import torch
from torch import Tensor

OVERSAMPLED = 10
"""Directions beyond those asked for that a randomized decomposition works with (arXiv 0909.4061)."""


def triplets(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), S (k) and Vᵀ (k, in) of W, k = min(out, in), largest first."""
    return oriented(*torch.linalg.svd(W, full_matrices=False))


def largest(W: Tensor, rank: int, iterations: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest triplets: of the whole SVD, or by so many steps of randomized subspace iteration."""
    width = rank + OVERSAMPLED
    if iterations is None or width >= min(W.shape):
        U, S, Vt = triplets(W)
        return U[:, :rank], S[:rank], Vt[:rank]
    draw = torch.Generator("cpu").manual_seed(0)
    X = torch.randn(W.shape[1], width, generator=draw, dtype=W.dtype, device="cpu").to(W.device)
    Q = torch.linalg.qr(W @ X).Q
    for _ in range(iterations):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.mT @ Q).Q).Q
    U, S, Vt = triplets(Q.mT @ W)
    return Q @ U[:, :rank], S[:rank], Vt[:rank]


def oriented(U: Tensor, S: Tensor, Vt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same triplets with the largest entry of each right vector positive."""
    extreme = Vt.gather(1, Vt.abs().argmax(1, keepdim=True))
    sign = torch.where(extreme < 0, -1.0, 1.0).to(Vt.dtype)
    return U * sign.mT, S, Vt * sign


def orthonormal(M: Tensor) -> Tensor:
    """Orthonormal rows spanning those of M, equal to M where it is orthonormal already: Q of Mᵀ = Q T, diag T > 0."""
    Q, T = torch.linalg.qr((M.float() if M.element_size() < 4 else M).mT)
    return (Q * T.diagonal().sign()).mT.to(M.dtype)
