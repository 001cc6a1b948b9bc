"""8-bit Adam against a NumPy run of its rule, and the codes of its state against bitsandbytes'."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import trimtab as tt
from trimtab.storage.dynamic8 import dynamic_map

STEPS, SHAPE, BLOCK = 6, (33, 130), 256
LEVELS = {signed: dynamic_map(signed).numpy() for signed in (True, False)}


def gradients() -> list[np.ndarray[Any, Any]]:
    """Gradients of very different sizes within a block, whose signs change: small moments round across zero."""
    draw = np.random.default_rng(7)
    size = 10.0 ** draw.uniform(-6, 0, SHAPE)
    return [(size * draw.standard_normal(SHAPE)).astype(np.float32) for _ in range(STEPS)]


def nearest(scaled: np.ndarray[Any, Any], levels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Index of the level at the least distance; the lower of two at the same."""
    return np.abs(scaled[:, None] - levels[None, :]).argmin(1).astype(np.uint8)


def encode(x: np.ndarray[Any, Any], signed: bool) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    codes, absmax = [], []
    for start in range(0, x.size, BLOCK):
        block = x.reshape(-1)[start : start + BLOCK]
        largest = np.abs(block).max()
        code = nearest(block * (np.float32(1) / largest), LEVELS[signed])
        if signed:
            code = code - ((code == 127) & np.signbit(block)).astype(np.uint8)
        codes.append(code)
        absmax.append(largest)
    return np.concatenate(codes), np.array(absmax, dtype=np.float32)


def decode(codes: np.ndarray[Any, Any], absmax: np.ndarray[Any, Any], signed: bool) -> np.ndarray[Any, Any]:
    return (LEVELS[signed][codes] * np.repeat(absmax, BLOCK)[: codes.size]).reshape(SHAPE)


def test_codes_and_steps_equal_a_numpy_run_of_the_rule_bit_for_bit() -> None:
    rule = tt.Adam8()
    s = rule.init(torch.zeros(SHAPE))
    m = v = np.zeros(SHAPE, dtype=np.float32)
    crossed = 0
    for t, g in enumerate(gradients(), 1):
        u = rule.update(torch.tensor(g), s, torch.zeros(SHAPE)).numpy()
        m = np.float32(rule.beta1) * m + np.float32(1 - rule.beta1) * g
        v = (np.float32(rule.beta2) * v) + np.float32(1 - rule.beta2) * g * g
        expected = (m / (1 - rule.beta1**t)) / (np.sqrt(v / (1 - rule.beta2**t)) + rule.epsilon)
        np.testing.assert_allclose(u, expected, rtol=2e-5, atol=1e-7)
        for moment, name, signed in ((m, "m", True), (v, "v", False)):
            codes, absmax = encode(moment, signed)
            np.testing.assert_array_equal(s[name]["codes"].numpy().reshape(-1), codes)
            np.testing.assert_allclose(s[name]["absmax"].numpy(), absmax, rtol=1e-6)
        crossed += int((s["m"]["codes"] == 126).sum())
        m = decode(s["m"]["codes"].numpy().reshape(-1), s["m"]["absmax"].numpy(), True)
        v = decode(s["v"]["codes"].numpy().reshape(-1), s["v"]["absmax"].numpy(), False)
    assert crossed > 100


def test_the_codes_of_its_moments_are_bitsandbytes() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    functional = bitsandbytes.functional
    rule = tt.Adam8()
    s = rule.init(torch.zeros(SHAPE))
    for g in gradients():
        before = {name: {key: value.clone() for key, value in s[name].items()} for name in ("m", "v")}
        rule.update(torch.tensor(g), s, torch.zeros(SHAPE))
        for name, signed, new in (("m", True, (rule.beta1, g)), ("v", False, (rule.beta2, g * g))):
            code = functional.create_dynamic_map(signed=signed)
            state = functional.QuantState(
                before[name]["absmax"], code=code, blocksize=BLOCK, dtype=torch.float32, shape=torch.Size(SHAPE)
            )
            moment = functional.dequantize_blockwise(before[name]["codes"], state)
            beta, term = new
            moment.mul_(beta)
            if name == "m":
                moment.add_(torch.tensor(term), alpha=1 - beta)
            else:
                moment.addcmul_(torch.tensor(g), torch.tensor(g), value=1 - beta)
            # the operator's reference implementation: the CPU kernel rounds to a grid of 65,536 steps first
            operator = torch.ops.bitsandbytes.quantize_blockwise.default
            key = torch._C.DispatchKey.CompositeExplicitAutograd
            codes, absmax = operator._op_dk(key, moment, code, BLOCK)
            codes = codes.view(SHAPE)
            if name == "m":
                codes = codes - ((codes == 127) & torch.signbit(moment)).to(torch.uint8)
            assert torch.equal(s[name]["absmax"], absmax.float().view(-1))
            assert torch.equal(s[name]["codes"], codes)


def test_small_tensors_keep_exact_moments_and_larger_ones_take_two_bytes_a_value() -> None:
    rule = tt.Adam8()
    one, other = torch.nn.Parameter(torch.ones(63, 65)), torch.nn.Parameter(torch.ones(63, 65))
    small, plain = tt.Optimizer([one], rule, lr=0.1), tt.Optimizer([other], tt.AdamW(), lr=0.1)
    for _ in range(5):
        one.grad, other.grad = torch.cos(one.detach()), torch.cos(other.detach())
        small.step()
        plain.step()
    torch.testing.assert_close(one, other)
    assert rule.state_bytes((63, 65)) == 8 * 63 * 65 + 8
    assert rule.state_bytes((4096, 4096)) / 4096**2 == pytest.approx(2.03, abs=0.002)


def test_a_gradient_that_is_not_finite_zeroes_the_moments_and_leaves_the_value() -> None:
    rule = tt.Adam8(smallest=1)
    p = torch.nn.Parameter(torch.ones(300))
    driver = tt.Optimizer([p], rule, lr=0.1)
    for bad in (1.0, float("nan"), float("inf")):
        p.grad = torch.ones(300)
        p.grad[7] = bad
        before = p.detach().clone()
        driver.step()
        assert torch.isfinite(p).all()
        assert (p[7] == before[7]) == (bad != 1.0)
        assert (p[8] != before[8]).all()
    s = driver.state[p]
    assert s["m"]["codes"][7] == 127
    assert s["v"]["codes"][7] == 0


def test_it_follows_adamw_closely() -> None:
    torch.manual_seed(0)
    X, Y = torch.randn(64, 96), torch.randn(64, 64)
    losses = {}
    for rule in (tt.AdamW(), tt.Adam8()):
        W = torch.nn.Parameter(torch.zeros(64, 96))
        driver = tt.Optimizer([W], rule, lr=0.01)
        for _ in range(60):
            driver.zero_grad()
            loss = (X @ W.T - Y).square().mean()
            loss.backward()
            driver.step()
        losses[type(rule).__name__] = loss.item()
    assert losses["Adam8"] == pytest.approx(losses["AdamW"], rel=0.05)
