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
