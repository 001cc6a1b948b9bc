"""Stepping inside backward: what is in memory meanwhile, clipping in two passes, and what cannot be done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import trimtab as tt
from trimtab.core.errors import UserError


class Net(nn.Module):
    """Four layers, the embedding tied to the head, dropout, and checkpointed or not."""

    def __init__(self, checkpointed: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.words = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4))
        self.dropout, self.checkpointed = nn.Dropout(dropout), checkpointed

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x))
        logits = self.dropout(x) @ self.words.weight.T
        return nn.functional.cross_entropy(logits, ids.roll(1))


IDS = torch.arange(11)


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def trained(model: Net, driver: Any, count: int = 5, clip: float | None = None) -> list[Tensor]:
    """The model's values after some steps, the gradient clipped by its norm."""
    for step in range(count):
        torch.manual_seed(step)
        inside = getattr(driver, "rule", None) is not None and driver.rule.in_backward
        if clip and inside:
            with driver.measuring():
                model(IDS).backward()
            measured = driver.clip(clip)
            assert measured > clip, "nothing was clipped, so nothing was tested"
            torch.manual_seed(step)
        model(IDS).backward()
        if clip and not inside:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        driver.step()
        driver.zero_grad()
    return values(model)


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(found, expected, strict=True))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_lomo_equals_sgd(checkpointed: bool) -> None:
    one, other = Net(checkpointed), Net(checkpointed)
    plain = trained(one, torch.optim.SGD(one.parameters(), lr=0.3))
    assert equal(trained(other, tt.Optimizer(other, tt.LOMO(), lr=0.3)), plain)


@pytest.mark.parametrize("inner", ["sgd", "adamw", "galore", "paged"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_clipping_by_the_norm_in_two_passes_equals_clipping_before_the_step(inner: str, dropout: float) -> None:
    one, other = Net(dropout=dropout), Net(dropout=dropout)
    plain = trained(one, tt.Optimizer(one, inner, lr=0.1, weight_decay=0.1), clip=0.05)
    hooked = tt.Optimizer(other, tt.InBackward(inner), lr=0.1, weight_decay=0.1)
    assert equal(trained(other, hooked, clip=0.05), plain)


def test_clipping_by_value_takes_one_pass() -> None:
    one, other = Net(), Net()
    plain = tt.Optimizer(one, tt.Chain((tt.Clip(0.01), tt.SGD(0.0))), lr=0.3)
    assert equal(trained(other, tt.Optimizer(other, tt.LOMO(clip_value=0.01), lr=0.3)), trained(one, plain))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_gradient_does_not_outlive_its_layer(checkpointed: bool) -> None:
    model = Net(checkpointed)
    alive: list[int] = []
    driver = tt.Optimizer(model, tt.LOMO(), lr=0.1)

    def look(p: Tensor) -> None:
        alive.append(sum(q.grad is not None for q in model.parameters()))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(look)
    before = values(model)
    model(IDS).backward()
    assert len(alive) == 9
    assert max(alive) <= 1
    assert all(p.grad is None for p in model.parameters())
    assert not any(torch.equal(p, q) for p, q in zip(before, values(model), strict=True)), "all have stepped already"
    driver.step()


def test_measuring_steps_nothing_and_gives_the_norm() -> None:
    model, plain = Net(), Net()
    plain(IDS).backward()
    expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1e9)
    driver, before = tt.Optimizer(model, tt.AdaLomo(), lr=0.1), values(model)
    with driver.measuring():
        model(IDS).backward()
    assert float(driver.measured()) == pytest.approx(float(expected), rel=1e-6)
    assert equal(values(model), before)
    assert not driver.state


def test_a_second_backward_in_one_step_is_an_error() -> None:
    model = Net()
    driver = tt.Optimizer(model, tt.LOMO(), lr=0.1)
    model(IDS).backward()
    with pytest.raises(UserError, match="second backward of the same step"):
        model(IDS).backward()
    driver.step()
    model(IDS).backward()


def test_hooks_are_released() -> None:
    model = Net()
    driver = tt.Optimizer(model, tt.LOMO(), lr=0.1)
    driver.release()
    model(IDS).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_frozen_parameter_that_trains_again_still_steps() -> None:
    model = Net()
    driver = tt.Optimizer(model, tt.LOMO(), lr=0.1)
    layer = model.layers[1][0]  # type: ignore[index]
    for trains in (True, False, True, False, True):
        layer.requires_grad_(trains)
        before = layer.weight.detach().clone()
        model(IDS).backward()
        driver.step()
        assert torch.equal(before, layer.weight) != trains
        assert layer.weight.grad is None


def test_adalomo_equals_its_authors_package(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = pytest.importorskip("lomo_optim.adalomo")
    monkeypatch.setattr(Tensor, "cuda", lambda self, *_: self)
    one, other = Net(), Net()
    theirs = peer.AdaLomo(one, lr=0.1, loss_scale=1.0)
    driver = tt.Optimizer(other, tt.AdaLomo(), lr=0.1)
    for _ in range(5):
        theirs.fused_backward(one(IDS), 0.1)
        other(IDS).backward()
        driver.step()
    for p, q in zip(values(one), values(other), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
