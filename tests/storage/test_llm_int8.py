"""LLM.int8(): the product against the paper's equation in NumPy, its gradient, and adapters beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab.core.code import Code
from trimtab.core.errors import UserError
from trimtab.storage import llm_int8


def inputs(tokens: int, columns: int, outliers: int = 3, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=draw).clamp(-4, 4)
    for number in range(outliers):
        x[number % tokens, 5 * number + 1] = 20.0 * (-1) ** number
    return x


def weight(out: int, into: int, seed: int = 1) -> Tensor:
    return torch.randn(out, into, generator=torch.Generator().manual_seed(seed)) * 0.1


def oracle(X: Any, W: Any, threshold: float) -> Any:
    """Section 3: columns with an outlier in full precision, the others in int8 with a scale per row of X and of W."""
    large = (np.abs(X) >= threshold).any(0)
    c_w = np.abs(W).max(1)
    W8 = np.rint(127 * W / c_w[:, None])
    rest = np.where(large, 0, X)
    c_x = np.abs(rest).max(1)
    X8 = np.rint(127 * rest / np.where(c_x > 0, c_x, 1)[:, None])
    products = X8.astype(np.int64) @ W8.astype(np.int64).T
    dense = W8 * c_w[:, None] / 127
    return products * np.outer(c_x, c_w) / 127**2 + X[:, large] @ dense[:, large].T


@pytest.mark.parametrize("outliers", [0, 1, 4])
@pytest.mark.parametrize(("tokens", "out", "into"), [(7, 24, 40), (1, 8, 48), (40, 32, 1600)])
def test_it_is_the_papers_product(outliers: int, tokens: int, out: int, into: int) -> None:
    X, W = inputs(tokens, into, outliers), weight(out, into)
    found = Code.of(W, tt.LLMInt8())(X)
    wanted = oracle(X.double().numpy(), W.double().numpy(), 6.0)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=2e-5 * np.abs(wanted).max())


def test_outliers_in_int8_would_cost_accuracy() -> None:
    X, W = inputs(32, 64, 4), weight(48, 64)
    exact = X @ Code.of(W, tt.Absmax()).dense().T  # what is lost by rounding W is the same for both
    lost = [float((Code.of(W, tt.LLMInt8(at))(X) - exact).norm()) for at in (6.0, float("inf"))]
    assert lost[0] < 0.5 * lost[1]


def test_with_every_column_apart_it_is_absmax() -> None:
    X, W = inputs(5, 40), weight(24, 40)
    torch.testing.assert_close(Code.of(W, tt.LLMInt8(0.0))(X), Code.of(W, tt.Absmax())(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("into", [64, 1024, 3000])
def test_sums_are_exact_with_and_without_a_product_of_integers(into: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    X, W = (torch.randint(-127, 128, (rows, into), dtype=torch.int8, generator=draw) for rows in (9, 16))
    X[0], W[0] = 127, 127
    wanted = X.long() @ W.long().T
    assert torch.equal(llm_int8.integer_product(X, W).long(), wanted)
    monkeypatch.setattr(llm_int8, "exact_on_cpu", lambda: False)
    assert torch.equal(llm_int8.integer_product(X, W).long(), wanted)


def test_the_gradient_is_that_of_the_dequantized_weight() -> None:
    X, W = inputs(6, 40).requires_grad_(), weight(24, 40)
    code = Code.of(W, tt.LLMInt8())
    G = torch.randn(6, 24)
    (code(X) * G).sum().backward()
    torch.testing.assert_close(X.grad, G @ code.dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_zeros_and_types(dtype: torch.dtype) -> None:
    X = inputs(4, 40).to(dtype)
    X[2] = 0
    y = Code.of(weight(24, 40).to(dtype), tt.LLMInt8())(X)
    assert y.dtype == dtype
    assert bool((y[2] == 0).all())
    assert bool(torch.isfinite(y).all())


def test_lora_trains_beside_it_and_its_dense_merge_is_near() -> None:
    torch.manual_seed(0)
    net = tt.quantize(nn.Sequential(nn.Linear(40, 32), nn.Linear(32, 8)), tt.LLMInt8(), where="*")
    tt.attach(net, tt.LoRA(rank=4), where="*")
    x = inputs(16, 40)
    before = net(x)
    y = torch.randn(16, 8)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(40):
        loss = (net(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        tuned = net(x)
        merged = tt.merge(net, quantized="dense")(x)
    size = float(tuned.abs().max())
    assert 0 < float((merged - tuned).abs().max()) < 0.05 * size, "merged weights take x unrounded"
    assert float((tuned - before).abs().max()) > 0.1 * size


def test_it_compiles_and_plans() -> None:
    net = tt.quantize(nn.Sequential(nn.Linear(40, 32)), tt.LLMInt8(), where="*")
    x = inputs(4, 40)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net, backend="eager", fullgraph=True)(x), net(x))
    with torch.device("meta"):
        hollow = tt.quantize(nn.Sequential(nn.Linear(40, 32)), tt.LLMInt8(), where="*")
        assert hollow(torch.empty(4, 40)).shape == (4, 32)


def test_a_threshold_below_zero_is_refused() -> None:
    with pytest.raises(UserError, match="threshold"):
        tt.LLMInt8(-1.0)
