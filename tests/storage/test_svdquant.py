"""SVDQuant: what it stores against the equation in NumPy, what it saves on outliers, and methods on top of it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab import laws
from trimtab.core.quantized import quantized_modules


def matrix(out: int, into: int, outliers: str = "none") -> Tensor:
    """A normal matrix, with planted outliers: whole columns, whole rows, or a few directions of large weight."""
    draw = torch.Generator().manual_seed(5)
    W = torch.randn(out, into, generator=draw)
    if outliers == "columns":
        W[:, [3, into // 2]] *= 25
    if outliers == "rows":
        W[[1, out // 2]] *= 25
    if outliers == "directions":
        W += 6 * torch.randn(out, 3, generator=draw) @ torch.randn(3, into, generator=draw)
    return W


def lost(format: Any, W: Tensor) -> float:
    return float((W - format.decode(format.encode(W), tuple(W.shape))).norm() / W.norm())


@pytest.mark.parametrize("inner", [tt.NF4(), tt.Affine(group_size=8), tt.Absmax()], ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("shape", [(48, 40), (40, 72)], ids=str)
def test_it_is_the_equation(inner: Any, shape: tuple[int, int]) -> None:
    """One round by NumPy's SVD: L1 L2 of rank r, rounded to bf16, and the rest as `inner` stores it."""
    W = matrix(*shape, "directions")
    format = tt.SVDQuant(inner=inner, rank=4, rounds=1)
    code = format.encode(W)
    L = code["up"].double().numpy() @ code["down"].double().numpy()
    U, S, Vt = np.linalg.svd(W.double().numpy(), full_matrices=False)
    best = (U[:, :4] * S[:4]) @ Vt[:4]
    assert np.abs(L - best).max() < 0.02 * np.abs(best).max(), "bf16 keeps 8 bits"
    rest = {key: value for key, value in code.items() if key not in ("up", "down")}
    left = torch.as_tensor(W.double().numpy() - L).float()
    for name, value in inner.encode(left).items():
        assert float((value.float() - rest[name].float()).abs().max()) <= (1 if "code" in name else 1e-5)
    wanted = L + inner.decode(rest, shape).double().numpy()
    np.testing.assert_allclose(format.decode(code, shape).numpy(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("outliers", ["columns", "rows", "directions"])
def test_it_loses_less_than_nf4_where_there_are_outliers(outliers: str) -> None:
    W = matrix(96, 128, outliers)
    assert lost(tt.SVDQuant(rank=4), W) < 0.6 * lost(tt.NF4(), W)


def test_rounds_only_help() -> None:
    W = matrix(64, 64)
    errors = [lost(tt.SVDQuant(rank=8, rounds=rounds), W) for rounds in (1, 3, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < lost(tt.NF4(), W)


@pytest.mark.parametrize("shape", [(48, 40), (8, 40)], ids=["wide enough", "smaller than the rank"])
def test_its_size_is_its_formula_and_known_before_encoding(shape: tuple[int, int]) -> None:
    format = tt.SVDQuant(rank=16)
    code, blank = format.encode(matrix(*shape)), format.encode(torch.empty(shape, device="meta"))
    assert sum(value.nbytes for value in code.values()) == format.bytes(shape)
    assert {k: (v.shape, v.dtype) for k, v in code.items()} == {k: (v.shape, v.dtype) for k, v in blank.items()}
    if shape[0] < 16:
        assert lost(format, matrix(*shape)) < 0.01


def inputs(into: int, large: int = 3) -> Tensor:
    """Rows of which a few entries are thirty times the others."""
    draw = torch.Generator().manual_seed(6)
    X = torch.randn(256, into, generator=draw)
    X[:, torch.randperm(into, generator=draw)[:large]] *= 30
    return X


def judged(W: np.ndarray, X: np.ndarray, scale: np.ndarray, inner: Any, rank: int) -> float:
    """Error of the outputs after one round with λ = `scale`, by NumPy's SVD, but for `inner`'s rounding."""
    U, S, Vt = np.linalg.svd(W * scale, full_matrices=False)
    L = (U[:, :rank] * S[:rank]) @ Vt[:rank]
    left = torch.as_tensor(W * scale - L).float()
    rest = inner.decode(inner.encode(left), tuple(W.shape)).double().numpy()
    return float(np.linalg.norm(X @ (W - (L + rest) / scale).T))


def test_smoothing_takes_the_scale_that_the_grid_of_the_paper_gives() -> None:
    W, X = matrix(48, 40, "directions"), inputs(40)
    code = tt.SVDQuant(inner=tt.Affine(group_size=8), rank=4, smooth=True).encode_for(W, X.mT @ X)
    found = code["smooth"].double().numpy()
    w, x = W.double().numpy(), X.double().numpy()
    seen, size = np.sqrt((x**2).mean(0)), np.abs(w).max(0)
    errors = {}
    for alpha, beta in [(0.0, 0.0)] + [(k / 20, b) for k in range(1, 21) for b in (0.0, 1 - k / 20)]:
        scale = seen**alpha / size**beta
        scale /= np.exp(np.log(scale).mean())
        errors[alpha, beta] = judged(w, x, scale, tt.Affine(group_size=8), 4), np.abs(scale / found - 1).max()
    best = min(error for error, _ in errors.values())
    taken = [error for error, away in errors.values() if away < 2**-8]
    assert taken, "λ is none of the grid"
    assert min(taken) < 1.02 * best
    assert best < 0.5 * errors[0.0, 0.0][0]


def test_the_branch_acts_on_the_input_itself_and_the_rest_on_what_lambda_leaves() -> None:
    W, X = matrix(24, 32), inputs(32)
    format = tt.SVDQuant(rank=4, smooth=True)
    code = format.encode_for(W, X.mT @ X)
    rest = format.inner.decode({key: code[key] for key in code if key not in ("up", "down", "smooth")}, (24, 32))
    wanted = (X @ code["down"].float().T) @ code["up"].float().T + (X / code["smooth"].float()) @ rest.T
    torch.testing.assert_close(X @ format.decode(code, (24, 32)).T, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("large", [0, 3])
def test_smoothing_changes_outputs_less(large: int) -> None:
    """Much less where some inputs are large, and never more: no λ is one that is tried."""
    W, X = matrix(96, 64), inputs(64, large)
    H = X.mT @ X

    def changed(format: Any) -> float:
        return float((X @ (W - format.decode(format.encode_for(W, H), (96, 64))).T).norm())

    plain, smooth = changed(tt.SVDQuant(rank=4)), changed(tt.SVDQuant(rank=4, smooth=True))
    assert smooth < (0.4 if large else 1.0) * plain


def test_an_input_that_is_never_seen_keeps_its_weight() -> None:
    W, X = matrix(48, 64), inputs(64)
    X[:, 5] = 0.0
    format = tt.SVDQuant(inner=tt.Absmax(), rank=4, smooth=True)
    found = format.decode(format.encode_for(W, X.mT @ X), (48, 64))
    assert bool(torch.isfinite(found).all())
    assert float((W - found)[:, 5].norm()) < float(W[:, 5].norm())


def test_smoothing_has_its_size_and_its_errors() -> None:
    format = tt.SVDQuant(rank=16, smooth=True)
    W, X = matrix(48, 40), inputs(40)
    code, blank = format.encode_for(W, X.mT @ X), format.encode(torch.empty(48, 40, device="meta"))
    assert sum(value.nbytes for value in code.values()) == format.bytes((48, 40))
    assert {k: (v.shape, v.dtype) for k, v in code.items()} == {k: (v.shape, v.dtype) for k, v in blank.items()}
    with pytest.raises(tt.UserError, match="not finite"):
        format.encode_for(W, X.mT @ X * float("nan"))
    with pytest.raises(tt.UserError, match="no inputs were given"):
        tt.quantize(nn.Sequential(nn.Linear(40, 48)), format, "*")


@pytest.mark.parametrize("name", ["lora", "magnitude", "hra", "qa_lora"])
def test_methods_keep_the_laws_on_it(name: str) -> None:
    """Gradients on codes are those on the decoded weights, merging keeps its word, files come back."""
    storage = laws.Storage("svdquant", tt.SVDQuant(rank=3))
    hosts = [host for host in laws.zoo() if host.name in ("linear", "conv1d", "slice")]
    pairs = laws.work(laws.small(tt.methods()[name]()), hosts, [storage])
    found = [law.verdict(case) for law, case in pairs if law.name in ("identity", "trains_only", "save", "quantized")]
    assert len(found) == 12
    assert not [str(verdict) for verdict in found if not verdict]


def test_a_lora_trains_on_it() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 24))
    model: Any = tt.attach(tt.quantize(copy.deepcopy(dense), tt.SVDQuant(rank=4), "*"), tt.LoRA(rank=4), "*")
    before = {path: module.code.state_dict() for path, module in quantized_modules(model)}  # type: ignore[union-attr]
    before = {path: {key: value.clone() for key, value in state.items()} for path, state in before.items()}
    x = torch.randn(64, 24)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(60):
        loss = (model(x) - x.roll(1, 1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    for path, module in quantized_modules(model):
        assert all(torch.equal(value, before[path][key]) for key, value in module.code.state_dict().items())  # type: ignore[union-attr]
