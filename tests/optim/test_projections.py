"""GaLore, Q-GaLore and APOLLO: what they are at their limits, against NumPy, and against their authors' packages."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab.core.errors import UserError
from trimtab.optim import _channels as channels

SIDES = [(6, 4), (4, 6), (5, 5)]


def draws(shape: tuple[int, int], count: int = 8, seed: int = 5) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("shape", SIDES)
@pytest.mark.parametrize("inner", ["adamw", "lion", "adafactor"])
def test_galore_with_the_identity_as_projector_is_its_inner_rule(shape: tuple[int, int], inner: str) -> None:
    rule = tt.GaLore(inner=inner, rank=min(shape), gap=1000)
    p = torch.zeros(shape, dtype=torch.float64)
    s, plain = rule.init(p), rule.inners[0].init(p)
    s["P"].copy_(torch.eye(min(shape)))
    s["t"] += 1
    for g in draws(shape):
        torch.testing.assert_close(rule.update(g, s, p), rule.inners[0].update(g, plain, p))


@pytest.mark.parametrize("shape", SIDES)
def test_galore_at_full_rank_over_sgd_is_sgd(shape: tuple[int, int]) -> None:
    rule = tt.GaLore(inner=tt.SGD(0.0), rank=min(shape), gap=2)
    s = rule.init(torch.zeros(shape, dtype=torch.float64))
    for g in draws(shape):
        torch.testing.assert_close(rule.update(g, s, g), g)


@pytest.mark.parametrize("shape", SIDES)
def test_galore_projects_the_smaller_side_and_keeps_its_directions_for_gap_steps(shape: tuple[int, int]) -> None:
    rule = tt.GaLore(inner=tt.SGD(0.0), rank=2, gap=3)
    s = rule.init(torch.zeros(shape, dtype=torch.float64))
    seen = []
    for g in draws(shape, 7):
        u = rule.update(g, s, g)
        assert torch.linalg.matrix_rank(u) == 2
        seen.append(s["P"].clone())
    assert s["P"].shape == (min(shape), 2)
    changes = [not torch.equal(one, other) for one, other in pairwise(seen)]
    assert changes == [False, False, True, False, False, True]


def test_states_are_as_small_as_the_papers_say() -> None:
    assert tt.GaLore(rank=1024).state_bytes((4096, 4096)) == 4 * 4096 * 1024 + 8 * 1024 * 4096 + 16
    assert tt.GaLore(inner="adafactor", rank=4).state_bytes((64, 32)) == 4 * 32 * 4 + 4 * (64 + 4) + 16
    eight = tt.QGaLore(rank=1024).state_bytes((4096, 4096)) / (4096 * 1024)
    assert eight == pytest.approx(0.53 + 2.03, abs=0.01)
    assert tt.APOLLO(rank=256).state_bytes((4096, 11008)) == 8 * 256 * 11008 + 20
    assert tt.APOLLOMini().state_bytes((4096, 11008)) == 8 * 11008 + 20


def test_what_reads_the_weight_cannot_be_inside_a_projection() -> None:
    with pytest.raises(UserError, match="reads the weight"):
        tt.GaLore(inner=tt.Chain((tt.Adafactor(), tt.Relative())))
    with pytest.raises(UserError, match="rank=0 is not 1 or more"):
        tt.GaLore(rank=0)


def test_q_galore_looks_less_often_where_the_directions_stay() -> None:
    gaps = {}
    steady = torch.outer(torch.arange(1.0, 9.0), torch.ones(12))
    for name, noise in (("steady", 0.01), ("wild", 100.0)):
        rule = tt.QGaLore(inner="sgd", rank=2, gap=2, recent=3, similar=0.9)
        s = rule.init(torch.zeros(8, 12))
        searched, before = [], None
        for t, extra in enumerate(draws((8, 12), 31)):
            rule.update(steady + noise * extra.float(), s, steady)
            if before is None or not torch.equal(before, s["Q"]["codes"]):
                searched.append(t)
            before = s["Q"]["codes"].clone()
        gaps[name] = (searched, int(s["gap"]))
    assert gaps["steady"] == ([0, 2, 4, 6, 10, 18], 16)
    assert gaps["wild"][1] == 2
    assert gaps["wild"][0][:4] == [0, 2, 4, 6]


@pytest.mark.parametrize("shape", SIDES)
def test_q_galore_is_galore_with_rounded_directions(shape: tuple[int, int]) -> None:
    fine, coarse = tt.GaLore(inner=tt.SGD(0.0), rank=3), tt.QGaLore(inner=tt.SGD(0.0), rank=3)
    p = torch.zeros(shape)
    s, q = fine.init(p), coarse.init(p)
    for g in draws(shape, 3):
        one, other = fine.update(g.float(), s, p), coarse.update(g.float(), q, p)
        assert torch.linalg.vector_norm(one - other) < 0.2 * torch.linalg.vector_norm(one)


@pytest.mark.parametrize("mini", [False, True])
@pytest.mark.parametrize("shape", SIDES)
def test_apollo_equals_a_numpy_run_of_its_equations(shape: tuple[int, int], mini: bool) -> None:
    rule: Any = tt.APOLLOMini(gap=3) if mini else tt.APOLLO(rank=2, gap=3, scale=9.0)
    rank = 1 if mini else 2
    s = rule.init(torch.zeros(shape, dtype=torch.float64))
    m = v = 0.0
    last = None
    for t, g in enumerate(draws(shape)):
        P = channels.projection(s, min(shape), rank, 3, g).numpy()
        G = g.numpy() if shape[0] < shape[1] else g.numpy().T  # channels are columns now
        R = P.T @ G
        m, v = 0.9 * m + 0.1 * R, 0.999 * v + 0.001 * R * R
        tilde = m / (np.sqrt(v) + 1e-6)
        factor = np.linalg.norm(tilde) / np.linalg.norm(R)
        if not mini:
            factor = np.sqrt((tilde**2).sum(0)) / np.sqrt((R**2).sum(0))
        u = G * factor
        if last is not None and np.linalg.norm(u) > 1.01 * last:
            u = u * 1.01 * last / np.linalg.norm(u)
        last = np.linalg.norm(u)
        u = u * np.sqrt(rule.scale) * np.sqrt(1 - 0.999 ** (t + 1)) / (1 - 0.9 ** (t + 1))
        expected = u if shape[0] < shape[1] else u.T
        np.testing.assert_allclose(rule.update(g, s, g).numpy(), expected, rtol=1e-6)


def test_apollo_draws_a_new_projection_after_gap_steps_of_the_stated_size() -> None:
    rule = tt.APOLLO(rank=64, gap=2)
    s = rule.init(torch.zeros(400, 500))
    seen = []
    for g in draws((400, 500), 3):
        seen.append(channels.projection(s, 400, 64, 2, g.float()))
        rule.update(g.float(), s, g)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert seen[0].var().item() == pytest.approx(1 / 64, rel=0.05)
    other = rule.init(torch.zeros(400, 500))
    assert int(other["seed"]) != int(s["seed"])


def walk(model: nn.Module, driver: torch.optim.Optimizer, count: int) -> Tensor:
    (p,) = model.parameters()
    for t in range(count):
        p.grad = torch.sin(p.detach() * (t + 1)) + 0.1 * torch.cos(torch.arange(p.numel()).view_as(p) + t)
        driver.step()
    return p.detach()


class One(nn.Module):
    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.W = nn.Parameter(torch.randn(shape))


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_galore_equals_its_authors_package(shape: tuple[int, int]) -> None:
    peer = pytest.importorskip("galore_torch")
    one, other = One(shape), One(shape)
    group = {"params": [one.W], "rank": 4, "update_proj_gap": 5, "scale": 0.25, "proj_type": "std"}
    theirs = peer.GaLoreAdamW([group], lr=0.01, no_deprecation_warning=True)
    ours = tt.Optimizer(other, tt.GaLore(inner=tt.AdamW(epsilon=1e-6), rank=4, gap=5, scale=0.25), lr=0.01)
    torch.testing.assert_close(walk(one, theirs, 17), walk(other, ours, 17), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("mini", [False, True])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_apollo_equals_its_authors_package(shape: tuple[int, int], mini: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = pytest.importorskip("apollo_torch")
    rule: Any = tt.APOLLOMini(scale=16.0) if mini else tt.APOLLO(rank=4, scale=2.0)
    rank = 1 if mini else 4
    P = torch.randn(min(shape), rank) / rank**0.5
    monkeypatch.setattr(channels, "projection", lambda *_: P)
    one, other = One(shape), One(shape)
    group = {"params": [one.W], "rank": rank, "update_proj_gap": 50, "scale": rule.scale, "proj": "random"}
    group |= {"scale_type": "tensor" if mini else "channel", "proj_type": "std"}
    theirs = peer.APOLLOAdamW([group], lr=0.01)

    def project(self: Any, G: Tensor, step: int) -> Tensor:
        return G @ P if G.shape[0] >= G.shape[1] else P.T @ G

    monkeypatch.setattr(peer.random_projector.GradientProjector, "project", project)
    ours = tt.Optimizer(other, rule, lr=0.01)
    torch.testing.assert_close(walk(one, theirs, 17), walk(other, ours, 17), rtol=1e-4, atol=2e-5)
