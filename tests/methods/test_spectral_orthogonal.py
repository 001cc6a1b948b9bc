"""What is particular to the spectral, orthogonal and multiplicative methods."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import trimtab as tt
from trimtab.core.errors import UserError

METHODS = tt.methods()


def adapted(name: str, out: int = 24, into: int = 32, moved: float = 0.3, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(into, out))
    tt.attach(model, METHODS[name](**settings), "*")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(moved * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    "name, settings",
    [("hra", {"rank": 4}), ("oft", {"block_size": 8}), ("boft", {"block_size": 4, "factors": 4})],
)
def test_rotations_keep_the_angles_between_neurons(name: str, settings: dict[str, Any]) -> None:
    """W'W'ᵀ = W Wᵀ, however far the trained tensors have moved; BOFT's scale is left at 1."""
    model = adapted(name, **settings)
    delta = model[0].delta["default"]
    if name == "boft":
        delta.s.data.fill_(1.0)
    W = model[0].weight
    new = delta.method.weight(W, delta)
    assert (new - W).abs().max() > 0.1
    torch.testing.assert_close(new @ new.T, W @ W.T, rtol=1e-4, atol=1e-5)


def test_butterflies_reach_from_every_input_to_every_other() -> None:
    """log2(in / block_size) + 1 sparse factors make a dense rotation; one less does not."""
    for factors, dense in ((4, True), (3, False)):
        model = adapted("boft", block_size=4, factors=factors)
        delta = model[0].delta["default"]
        R = delta.method.turned(torch.eye(32), delta)
        assert bool((R.abs() > 1e-9).all()) is dense


@pytest.mark.parametrize(
    "name, settings, found",
    [
        ("oft", {"block_size": 7}, "blocks of 7 do not divide 32"),
        ("boft", {"block_size": 16, "factors": 3}, "blocks of 64 do not divide 32"),
        ("c3a", {"block_size": 16}, "blocks of 16 do not divide 24 and 32"),
        ("bat", {"block_size": 16}, "blocks of 16 do not divide 24 and 32"),
        ("road", {"group_size": 16}, "blocks of 16 do not divide 24"),
    ],
)
def test_sizes_that_do_not_divide_are_an_error_with_the_nearest(
    name: str, settings: dict[str, Any], found: str
) -> None:
    with pytest.raises(UserError, match=found) as error:
        adapted(name, **settings)
    assert error.value.fix is not None
    assert error.value.fix.endswith("do")


@pytest.mark.parametrize(
    "name, settings",
    [
        ("hra", {"rank": 3}),
        ("hra", {"orthogonality": -1.0}),
        ("oft", {"block_size": 1}),
        ("boft", {"block_size": 3}),
        ("road", {"angles": 3}),
        ("fourier_ft", {"coefficients": 0}),
        ("svft", {"pattern": "dense"}),
        ("shira", {"mask": "snip"}),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        METHODS[name](**settings)


def test_constrained_rotations_stay_near_the_identity() -> None:
    """COFT: after a step, no block's skew matrix is longer than limit / √blocks."""
    model = adapted("oft", block_size=8, limit=0.1)
    delta = model[0].delta["default"]
    before = delta.q.detach().clone()
    delta.method.on_step(delta, 1)
    norm = 2**0.5 * delta.q.detach().norm(dim=-1)
    torch.testing.assert_close(norm, torch.full_like(norm, 0.1 / 4**0.5))
    direction = torch.nn.functional.cosine_similarity(before, delta.q.detach(), dim=-1)
    torch.testing.assert_close(direction, torch.ones_like(direction))


def test_dropped_blocks_are_not_rotated() -> None:
    model = adapted("oft", block_size=8, dropout=1.0).train()
    x = torch.randn(5, 32)
    torch.testing.assert_close(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))
    assert (model.eval()(x) - nn.functional.linear(x, model[0].weight, model[0].bias)).abs().max() > 0.1


def test_the_penalty_of_hra_pulls_reflections_apart() -> None:
    model = adapted("hra", rank=4, orthogonality=0.5, moved=0.0)
    delta = model[0].delta["default"]
    penalty = delta.method.penalty(delta)
    V = delta.U / delta.U.norm(dim=0)
    torch.testing.assert_close(penalty, 0.5 * (V.T @ V - torch.eye(4)).square().sum())
    assert penalty > 1.0, "equal columns, as at the start"
    assert METHODS["hra"](rank=4).penalty(delta) is None


@pytest.mark.parametrize("pattern", ["plain", "banded", "random", "top"])
def test_patterns_of_svft(pattern: str) -> None:
    model = adapted("svft", pattern=pattern, width=2)
    delta = model[0].delta["default"]
    rows, columns = delta.index // 24, delta.index % 24
    assert len(delta.index) == len(set(delta.index.tolist())) == delta.m.numel()
    if pattern in ("plain", "banded"):
        assert int((rows - columns).abs().max()) == (0 if pattern == "plain" else 2)
    if pattern == "top":
        scores = (delta.U[:24].T @ delta.V[:24]).flatten()
        rest = torch.ones(24 * 24, dtype=torch.bool)
        rest[delta.index] = False
        assert scores[delta.index].min() >= scores[rest].max()


@pytest.mark.parametrize("mask", ["random", "magnitude", "structured"])
def test_masks_of_shira(mask: str) -> None:
    model = adapted("shira", rank=2, mask=mask)
    delta, W = model[0].delta["default"], model[0].weight
    chosen = torch.zeros(24 * 32, dtype=torch.bool)
    chosen[delta.index] = True
    assert int(chosen.sum()) == 2 * (24 + 32)
    if mask == "magnitude":
        assert W.flatten().abs()[chosen].min() >= W.flatten().abs()[~chosen].max()
    if mask == "structured":
        grid = chosen.view(24, 32)
        assert bool(grid.diagonal().all())
        assert bool(grid[0].all())


def test_fourier_sites_of_one_shape_share_their_places() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8))
    tt.attach(model, METHODS["fourier_ft"](coefficients=10), "*")
    one, two, three = (model[index].delta["default"] for index in range(3))
    assert model(torch.randn(2, 16)).shape == (2, 8), "what is shared is no step of a model that is a Sequential"
    assert one.shared is two.shared
    places = {name for name, _ in one.shared.named_buffers()}
    assert places == {"places_16_16", "places_8_16"}
    assert three.c.shape == (10,)
