"""HQQ: against NumPy in float64, below the plain code's error, stored and trained over as affine codes are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import trimtab as tt
from trimtab.storage.affine import Affine
from trimtab.storage.hqq import HQQ, shrink


def heavy(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw) * torch.exp(0.7 * torch.randn(shape, generator=draw))


def oracle(W: np.ndarray, bits: int, size: int) -> np.ndarray:
    """Group by group, every round over all groups, as the criterion is that of the whole matrix."""
    groups = W.reshape(-1, size)
    low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    scale, top = (high - low) / (2**bits - 1), 2**bits - 1
    zero = -low / scale
    best, lowest = None, np.inf
    for _ in range(21):
        q = np.clip(np.round(groups / scale + zero), 0, top)
        decoded = (q - zero) * scale
        error = np.abs(groups - decoded).mean()
        if error >= lowest:
            break
        best, lowest = decoded, error
        d = groups - decoded
        with np.errstate(divide="ignore", invalid="ignore"):
            E = np.sign(d) * np.maximum(0, np.abs(d) - np.abs(d) ** (0.7 - 1) / 10)
        zero = (q - (groups - np.nan_to_num(E)) / scale).mean(1, keepdims=True)
    assert best is not None
    return best.reshape(W.shape)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_it_is_the_published_iteration(bits: int) -> None:
    W = heavy((24, 128))
    found = HQQ(bits, 32).decode(HQQ(bits, 32).encode(W), (24, 128))
    np.testing.assert_allclose(found.double().numpy(), oracle(W.double().numpy(), bits, 32), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_error_is_below_that_of_the_plain_code(bits: int) -> None:
    W = heavy((64, 256), seed=1)
    plain, fitted = Affine(bits, 64), HQQ(bits, 64)
    errors = [(one.decode(one.encode(W), W.shape) - W).abs().mean() for one in (fitted, plain)]
    assert errors[0] < 0.99 * errors[1]


def test_zeros_and_constants_stay_exact() -> None:
    for W in (torch.zeros(4, 64), torch.full((4, 64), -0.3)):
        torch.testing.assert_close(HQQ().decode(HQQ().encode(W), (4, 64)), W)


def test_it_is_stored_and_counted_as_affine() -> None:
    W = heavy((8, 128))
    code, plain = HQQ().encode(W), Affine(4, 64).encode(W)
    assert {name: one.shape for name, one in code.items()} == {name: one.shape for name, one in plain.items()}
    assert HQQ().bits((8, 128)) == Affine(4, 64).bits((8, 128)) == 5
    assert torch.equal(code["scale"], plain["scale"])


@pytest.mark.parametrize("method", [tt.LoRA(rank=2), tt.QALoRA(rank=2, group_size=16), tt.PEQA()], ids=str)
def test_methods_train_and_merge_over_it(method: tt.Method) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 12))
    tt.quantize(model, HQQ(group_size=16))
    tt.attach(model, method)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(3, 32)
    y = model(x)
    y.square().sum().backward()
    assert all(one.grad is not None for one in model.parameters() if one.requires_grad)
    if not isinstance(method, tt.LoRA):
        tt.merge(model)
        torch.testing.assert_close(model(x), y.detach(), rtol=1e-5, atol=1e-5)


def test_shrink_is_nearly_the_minimum() -> None:
    """|E|^0.7 + 5 (E − d)² at the shrunk value is as low as anywhere on a grid, within the approximation's 10 %."""
    grid = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    for d in (-2.0, -0.6, 0.9, 2.5):
        cost = grid.abs() ** 0.7 / 0.7 + 5 * (grid - d) ** 2
        E = shrink(torch.tensor(d, dtype=torch.float64), 0.7, 10.0)
        assert float(E.abs() ** 0.7 / 0.7 + 5 * (E - d) ** 2) < 1.1 * float(cost.min())


def test_what_is_refused() -> None:
    for settings in ({"power": 0}, {"power": 2}, {"beta": 0}, {"rounds": 0}, {"code_bits": 5}, {"group_size": 0}):
        with pytest.raises(tt.UserError):
            HQQ(**settings)
    with pytest.raises(tt.UserError, match="does not divide"):
        HQQ().encode(torch.randn(4, 60))
