"""The starts against PEFT's: the same factors, or the same product where only a sign or a scale is free."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab.core.registry import find

peft = pytest.importorskip("peft")

IN, OUT, RANK = 24, 40, 4
FALLING = 1.5 ** -torch.arange(IN)
X = torch.randn(64, IN, generator=torch.Generator().manual_seed(5)) * FALLING
"""Inputs and weights whose singular values differ clearly: PEFT finds some of them at random."""


def model() -> nn.Module:
    torch.manual_seed(3)
    made = nn.Sequential(nn.Linear(IN, OUT))
    with torch.no_grad():
        made[0].weight.mul_(FALLING.flip(0))
    return made


def ours(start: Any, measured: Tensor | None = None, alpha: float = 6.0) -> tuple[nn.Module, Any]:
    """Our model with a start, and its delta."""
    statistics = None if measured is None else {"0": measured}
    mine: Any = tt.attach(model(), tt.LoRA(rank=RANK, alpha=alpha, start=start), "*", statistics=statistics)
    return mine, mine[0].delta["default"]


def settings(name: str, alpha: int = 6, **more: Any) -> Any:
    return peft.LoraConfig(r=RANK, lora_alpha=alpha, target_modules=["0"], init_lora_weights=name, **more)


def factors(other: Any) -> tuple[Tensor, Tensor]:
    layer = other.base_model.model[0]
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def agree(found: Tensor, wanted: Tensor) -> None:
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def same_training(mine: nn.Module, delta: Any, other: Any) -> None:
    """With PEFT's factors moved and copied over, outputs and gradients agree: W0 is W − s·B0 A0 on both sides."""
    A, B = factors(other)
    with torch.no_grad():
        delta.A.copy_(A.add_(0.1 * torch.randn_like(A)))
        delta.B.copy_(B.add_(0.1 * torch.randn_like(B)))
    y, z = mine(X), other(X)
    agree(y, z)
    y.square().mean().backward()
    z.square().mean().backward()
    agree(delta.A.grad, A.grad)
    agree(delta.B.grad, B.grad)


@pytest.mark.parametrize("theirs", ["pissa", "pissa_niter_16"])
def test_pissa(theirs: str) -> None:
    iterations = None if theirs == "pissa" else 16
    mine, delta = ours(find("pissa", "start")(iterations=iterations))
    other = peft.get_peft_model(model(), settings(theirs))
    A, B = factors(other)
    signs = (delta.A * A).sum(1).sign()
    if iterations is None:
        agree(delta.A, signs[:, None] * A)
        agree(delta.B, signs * B)
        agree(delta.B0 @ delta.A0, B @ A)
        same_training(mine, delta, other)
    else:
        assert (delta.B @ delta.A - B @ A).norm() < 0.02 * (B @ A).norm()


def test_olora() -> None:
    mine, delta = ours(find("olora", "start")())
    other = peft.get_peft_model(model(), settings("olora"))
    A, B = factors(other)
    agree(delta.A, A.diagonal().sign()[:, None] * A)
    agree(delta.B, B * A.diagonal().sign())
    same_training(mine, delta, other)


@pytest.mark.parametrize(("part", "method"), [("largest", "ipm"), ("smallest", "kpm")])
def test_corda(part: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT divides each sample by its largest entry: with one sample C is only scaled, and the product is the same."""
    monkeypatch.setitem(sys.modules, "attr", dataclasses)  # it takes `dataclass` from a package it does not require
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    base = model()
    config = settings("corda", corda_config=CordaConfig(corda_method=method))
    preprocess_corda(base, config, run_model=lambda: base(X))
    other = peft.get_peft_model(base, config)
    C = tt.covariance(model(), [{"x": X}], "*", loss=lambda m, batch: m(batch["x"]).sum())["0"]
    mine, delta = ours(find("corda", "start")(part=part), C)
    A, B = factors(other)
    assert (delta.B @ delta.A - B @ A).abs().max() < 1e-4 * (B @ A).abs().max()
    agree(mine(X), model()(X))


def test_eva() -> None:
    """On inputs whose mean is zero: PEFT subtracts the mean, as its incremental PCA does; the paper's SVD does not."""
    from peft.tuners.lora.config import EvaConfig
    from peft.tuners.lora.eva import get_eva_state_dict

    centered = X - X.mean(0)
    config = settings("eva", eva_config=EvaConfig(rho=1.0, tau=0.0))
    found = get_eva_state_dict(
        model(),
        [{"x": centered}],
        config,
        forward_fn=lambda m, batch: m(batch["x"]),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda layer_input, model_input, layer_name: layer_input[0],
        show_progress_bar=False,
    )
    (A,) = found.values()
    C = tt.covariance(model(), [{"x": centered}], "*", loss=lambda m, batch: m(batch["x"]).sum())["0"]
    _, delta = ours(find("eva", "start")(), C)
    signs = (delta.A * A).sum(1).sign()
    assert (delta.A - signs[:, None] * A).abs().max() < 1e-4


def test_lora_ga_differs_in_its_scale_only() -> None:
    """PEFT gives B the gradient's singular values and leaves A unscaled; the paper's code scales both by one number."""
    from peft.tuners.lora.config import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    base = model()
    config = settings("lora_ga", lora_ga_config=LoraGAConfig(direction="ArB2r", scale="stable", stable_gamma=16))
    preprocess_loraga(base, config, train_step=lambda: base(X).square().mean().backward())
    other = peft.get_peft_model(base, config)
    A, B = (one.detach() for one in factors(other))
    G = tt.gradient(model(), [{"x": X}], "*", loss=lambda m, batch: m(batch["x"]).square().mean())["0"]
    _, delta = ours(find("lora_ga", "start")(), G)
    kappa = OUT**0.25 / 4
    for mine, its, dim in ((delta.A, A, 1), (delta.B, B, 0)):
        unit = its / torch.linalg.vector_norm(its, dim=dim, keepdim=True)
        signs = (mine * unit).sum(dim, keepdim=True).sign()
        assert (mine / kappa - signs * unit).abs().max() < 2e-3
    assert torch.allclose(torch.linalg.vector_norm(A, dim=1), torch.ones(RANK), atol=1e-5)


def test_loftq_alternates_as_peft_does() -> None:
    """PEFT computes on a GPU only, so its loop is written out here around its own decomposition and bitsandbytes."""
    functional = pytest.importorskip("bitsandbytes").functional
    from peft.utils.loftq_utils import _low_rank_decomposition

    W = model()[0].weight.detach()
    left = W.clone()
    for _ in range(3):
        code, state = functional.quantize_4bit(left, blocksize=64, quant_type="nf4", compress_statistics=False)
        Q = functional.dequantize_4bit(code, state)
        found = _low_rank_decomposition(W - Q, reduced_rank=RANK)
        left = W - found["L"] @ found["R"]
    start = find("loftq", "start")(rounds=3, iterations=None)
    mine: Any = tt.attach(model(), tt.LoRA(rank=RANK, alpha=RANK, start=start), "*", quantize=tt.NF4())
    delta = mine[0].delta["default"]
    agree(delta.B @ delta.A, found["L"] @ found["R"])
    code = mine[0].code
    agree(code.dense() - code.up @ code.down, Q)
