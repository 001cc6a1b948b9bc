"""GPTQ: the column loop against the paper's in NumPy float64, and what it gains over rounding to the nearest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import trimtab as tt
from trimtab.core.errors import UserError


def inputs(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Correlated inputs of unequal sizes, as a layer sees them."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=draw) / columns**0.5
    sizes = torch.rand(columns, generator=draw) * 3 + 0.1
    return torch.randn(rows, columns, generator=draw) @ (2 * mix + torch.eye(columns)) * sizes


def weight(out: int, into: int, seed: int = 1) -> Tensor:
    return torch.randn(out, into, generator=torch.Generator().manual_seed(seed)) * 0.05


def grid(group: Any, top: int) -> tuple[Any, Any]:
    low, high = group.min(1), group.max(1)
    scale = (high - low) / top
    return scale, -low / scale


def oracle(W: Any, X: Any, bits: int, size: int, damping: float, act_order: bool) -> Any:
    """Algorithm 1 without its blocks: the inverse Hessian's Cholesky factor, one column after the other."""
    H = 2 * X.T @ X
    H += damping * np.mean(np.diag(H)) * np.eye(len(H))
    order = np.argsort(-np.diag(H), kind="stable") if act_order else np.arange(len(H))
    U = np.linalg.cholesky(np.linalg.inv(H[np.ix_(order, order)])).T
    top, W, found = 2**bits - 1, W.copy(), np.zeros_like(W)
    grids = {g: grid(W[:, g * size : (g + 1) * size], top) for g in range(W.shape[1] // size)}
    W = W[:, order]
    for i, column in enumerate(order):
        if not act_order and i % size == 0:
            grids[i // size] = grid(W[:, i : i + size], top)
        scale, zero = grids[column // size]
        q = np.clip(np.round(W[:, i] / scale + zero), 0, top)
        found[:, column] = (q - zero) * scale
        W[:, i:] -= np.outer((W[:, i] - found[:, column]) / U[i, i], U[i, i:])
    return found


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    ("bits", "group_size", "block"), [(4, 8, 128), (3, 16, 8), (2, None, 5), (8, 12, 20), (4, 48, 7)]
)
def test_it_is_the_papers_column_loop(bits: int, group_size: int | None, block: int, act_order: bool) -> None:
    X, W = inputs(200, 48), weight(24, 48)
    format = tt.GPTQ(bits, group_size, act_order, block_size=block)
    found = format.decode(format.encode_for(W, X.T @ X), (24, 48)).double().numpy()
    wanted = oracle(W.double().numpy(), X.double().numpy(), bits, group_size or 48, 0.01, act_order)
    off = np.abs(found - wanted) > 1e-4 * np.abs(wanted).max()
    assert off.mean() < 0.002, "a value halfway between two codes may fall to the other one in fp32"


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("act_order", [False, True])
def test_it_changes_outputs_less_than_rounding_to_the_nearest(bits: int, act_order: bool) -> None:
    X, W = inputs(400, 64), weight(32, 64)
    plain, format = tt.Affine(bits, 16), tt.GPTQ(bits, 16, act_order)
    nearest = plain.decode(plain.encode(W), (32, 64))
    chosen = format.decode(format.encode_for(W, X.T @ X), (32, 64))
    lost, kept = ((X @ (W - V).T).norm() for V in (nearest, chosen))
    assert kept < 0.9 * lost
    assert (W - chosen).norm() > (W - nearest).norm(), "the weights themselves are nearer when rounded"


def test_uncorrelated_inputs_make_it_rounding_to_the_nearest() -> None:
    W, format = weight(16, 32), tt.GPTQ(4, 8)
    plain = tt.Affine(4, 8).encode(W)
    for name, value in format.encode_for(W, torch.eye(32)).items():
        assert torch.equal(value, plain[name])
    assert all(torch.equal(value, plain[name]) for name, value in format.encode(W).items())


def test_an_input_never_seen_keeps_no_weight() -> None:
    X, W = inputs(100, 16), weight(8, 16)
    X[:, 3] = 0
    format = tt.GPTQ(4, 16)
    found = format.decode(format.encode_for(W, X.T @ X), (8, 16))
    step = format.encode_for(W, X.T @ X)["scale"].max()
    assert found[:, 3].abs().max() <= step / 2 + 1e-6
    assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: tt.GPTQ(5), "code_bits=5"),
        (lambda: tt.GPTQ(damping=0.0), "damping"),
        (lambda: tt.GPTQ(4, 7).encode_for(weight(4, 16), torch.eye(16)), "does not divide"),
        (lambda: tt.GPTQ(4, 8).encode_for(weight(4, 16), torch.full((16, 16), float("nan"))), "not finite"),
        (lambda: tt.GPTQ(4, 8).encode_for(weight(4, 16), -torch.eye(16)), "no inverse"),
    ],
)
def test_what_cannot_be_done_is_said(make: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        make()
