"""Training for few bits: gradients by hand, what is saved, and that it beats rounding afterwards."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab.core.bits import pack, packed_bytes, unpack
from trimtab.core.errors import UserError
from trimtab.core.save import save
from trimtab.interop.load import load


def model(seed: int = 0, bias: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 16, bias=bias), nn.Linear(16, 8, bias=bias))


def tensors(net: nn.Module) -> dict[str, Tensor]:
    return {name.rsplit(".", 1)[-1]: value for name, value in net[0].named_parameters() if "delta" in name}  # type: ignore[index]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 7, 8, 24, 61])
def test_codes_are_packed_and_unpacked(bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(count)).to(torch.uint8)
    stream = pack(codes, bits)
    assert len(stream) == packed_bytes(count, bits)
    assert torch.equal(unpack(stream, bits, count), codes)


@pytest.mark.parametrize("group_size", [None, 8])
def test_lsq_has_the_papers_gradients(group_size: int | None) -> None:
    """Equations 2 to 5 by NumPy, with the gradient scale of section 2.2 for the weights of one step."""
    net = tt.attach(model(), tt.LSQ(3, group_size), where="0").double()
    with torch.no_grad():
        tensors(net)["s"].mul_(0.6)  # so that some weights are beyond the clamp
    x = torch.randn(5, 24, dtype=torch.float64)
    G = torch.randn(5, 16, dtype=torch.float64)
    (net[0](x) * G).sum().backward()  # type: ignore[index]
    V, s = (tensors(net)[name].detach().numpy() for name in ("V", "s"))
    size, dW = group_size or 24, G.T.numpy() @ x.numpy()
    ratio = V / s.repeat(size, 1)
    inside = (ratio > -4) & (ratio < 3)
    assert 0 < (~inside).mean() < 0.5
    each = np.where(inside, np.round(ratio) - ratio, np.where(ratio <= -4, -4, 3))
    wanted = (dW * each).reshape(16, -1, size).sum(-1) / np.sqrt(size * 3)
    np.testing.assert_allclose(tensors(net)["s"].grad.numpy(), wanted, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(tensors(net)["V"].grad.numpy(), dW * inside, rtol=1e-9, atol=1e-12)


def test_lsq_starts_at_the_papers_step() -> None:
    net = model()
    W = net[0].weight.detach().clone()  # type: ignore[index,union-attr,operator]
    tt.attach(net, tt.LSQ(4), where="0")
    torch.testing.assert_close(tensors(net)["s"][:, 0], 2 * W.abs().mean(1) / 7**0.5)


def test_qat_passes_the_gradient_straight_through() -> None:
    net = tt.attach(model(), tt.QAT(3, 8), where="0")
    x, G = torch.randn(5, 24), torch.randn(5, 16)
    (net[0](x) * G).sum().backward()  # type: ignore[index]
    torch.testing.assert_close(tensors(net)["V"].grad, G.T @ x)


@pytest.mark.parametrize("method", [tt.QAT(3, 8), tt.LSQ(4), tt.LSQ(2, 12)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_what_is_saved_is_small_and_computes_the_same(method: Any, bias: bool, tmp_path: Path) -> None:
    net = tt.attach(model(bias=bias), method, where="0")
    with torch.no_grad():
        for value in tensors(net).values():
            value.mul_(1 + 0.1 * torch.randn_like(value))
    x = torch.randn(6, 24)
    before = net(x)
    save(net, tmp_path / "adapter", bake=True)
    again = load(model(bias=bias), tmp_path / "adapter", trainable=False)
    torch.testing.assert_close(again(x), before, rtol=1e-5, atol=1e-6)
    assert not any(parameter.requires_grad for name, parameter in again.named_parameters() if "delta" in name)
    held = {name.rsplit(".", 1)[-1]: value for name, value in again.state_dict().items() if "delta" in name}
    assert set(held) == {"codes", "scale", "zero", *(["c"] if bias else [])}
    assert held["codes"].nbytes == packed_bytes(16 * 24, method.code_bits)
    merged = tt.merge(again)
    torch.testing.assert_close(merged(x), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [tt.QAT, tt.LSQ], ids=["qat", "lsq"])
@pytest.mark.parametrize("group_size", [None, 8])
def test_it_merges_exactly_into_affine_codes_of_its_kind(make: Any, group_size: int | None) -> None:
    net = tt.quantize(model(), tt.Affine(4, group_size), where="0")
    tt.attach(net, make(4, group_size), where="0")
    with torch.no_grad():
        tensors(net)["V"].add_(0.05 * torch.randn(16, 24))
    x = torch.randn(6, 24)
    before = net(x)
    merged = tt.merge(net, quantized="exact")
    assert "code" in merged[0]._modules  # type: ignore[index]
    torch.testing.assert_close(merged(x), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [tt.QAT, tt.LSQ], ids=["qat", "lsq"])
def test_training_with_rounding_beats_rounding_afterwards(make: Any) -> None:
    torch.manual_seed(3)
    x, target = torch.randn(256, 24), torch.randn(24, 16) / 5
    y = x @ target

    def trained(net: nn.Module, steps: int = 150) -> nn.Module:
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=3e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            (net[0](x) - y).square().mean().backward()  # type: ignore[index]
            optimizer.step()
        return net

    plain = trained(model())
    with torch.no_grad():
        rounded = tt.quantize(copy.deepcopy(plain), tt.Affine(3, None), where="0")
        after = (rounded[0](x) - y).square().mean()  # type: ignore[index]
        net = tt.attach(copy.deepcopy(plain).requires_grad_(False), make(3), where="0")
    with torch.enable_grad():
        trained(net)
    with torch.no_grad():
        assert (net[0](x) - y).square().mean() < 0.9 * after  # type: ignore[index]


@pytest.mark.parametrize("make", [tt.QAT, tt.LSQ], ids=["qat", "lsq"])
def test_sizes_that_do_not_fit_are_said(make: Any) -> None:
    with pytest.raises(UserError, match="code_bits=5"):
        make(5)
    with pytest.raises(UserError, match="does not divide"):
        tt.attach(model(), make(4, 7), where="0")
