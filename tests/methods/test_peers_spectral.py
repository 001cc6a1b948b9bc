"""Spectral, orthogonal and multiplicative methods against PEFT: the same tensors, the same outputs and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_peers_low_rank import TALL, TARGETS, WIDE, compare, ours, same, theirs

import trimtab as tt

peft = pytest.importorskip("peft")

METHODS = tt.methods()


def pair(method: Any, config: Any, *names: tuple[str, str, Any], sizes: Any = (TALL, WIDE)) -> None:
    """Our layers against PEFT's, tensor by tensor: (our name, their name, how ours is written in theirs)."""
    model, deltas = ours(method, *sizes)
    other, layers = theirs(config, *sizes)
    pairs = []
    for delta, layer in zip(deltas, layers, strict=True):
        for mine, yours, view in names:
            there = getattr(layer, yours)["default"]
            pairs.append((getattr(delta, mine), getattr(there, "weight", there), view))
    compare(model, other, pairs)


def test_hra() -> None:
    pair(METHODS["hra"](rank=4), peft.HRAConfig(r=4, target_modules=TARGETS), ("U", "hra_u", same))


def test_oft() -> None:
    """PEFT's exact branch is the transpose of the Cayley map, so its skew matrix is ours negated."""
    config = peft.OFTConfig(oft_block_size=8, target_modules=TARGETS, use_cayley_neumann=False)
    pair(METHODS["oft"](block_size=8), config, ("q", "oft_R", lambda q: -q))


def test_boft_with_one_factor() -> None:
    """More factors need PEFT's CUDA extension; without it, it uses one, whatever it is asked for."""
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1, target_modules=TARGETS)
    names = ("D", "boft_R", same), ("s", "boft_s", lambda s: s[:, None])
    pair(METHODS["boft"](block_size=4, factors=1), config, *names)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_butterfly_of_boft(index: int) -> None:
    """Which inputs a factor rotates together: PEFT's permutation, read off our factor by what it mixes."""
    size, into = 4, 32
    order = peft.tuners.boft.layer.BOFTLayer.block_butterfly_perm(None, into, into // size // 2**index, size // 2, 1)
    P = torch.zeros(into, into)
    P[torch.arange(into), order] = 1.0
    torch.manual_seed(0)
    R = torch.randn(into // size, size, size)
    dense = P @ torch.block_diag(*R) @ P.T
    found = METHODS["boft"](block_size=size, factors=index + 1).factor(torch.eye(into), R, index)
    torch.testing.assert_close(found, dense)


def test_miss() -> None:
    config = peft.MissConfig(r=6, target_modules=TARGETS)
    pair(METHODS["miss"](rank=6), config, ("D", "miss_block", same))


def test_miss_with_a_short_last_piece() -> None:
    pair(METHODS["miss"](rank=7), peft.MissConfig(r=7, target_modules=TARGETS), ("D", "miss_block", same))


def test_mini_miss() -> None:
    config = peft.MissConfig(r=6, mini_r=8, init_weights="mini", target_modules=TARGETS)
    pair(METHODS["miss"](rank=6, columns=8), config, ("D", "miss_block", same))


def test_bat() -> None:
    config = peft.MissConfig(r=8, init_weights="bat", target_modules=TARGETS)
    pair(METHODS["bat"](block_size=8), config, ("D", "miss_block", same))


@pytest.mark.parametrize("angles", [1, 2, 4])
def test_road(angles: int) -> None:
    config = peft.RoadConfig(variant=f"road_{angles}", group_size=8, target_modules=TARGETS)
    pair(
        METHODS["road"](angles=angles, group_size=8),
        config,
        ("theta", "road_theta", same),
        ("alpha", "road_alpha", same),
    )


@pytest.mark.parametrize("size", [TALL, WIDE], ids=["tall", "wide"])
def test_c3a(size: tuple[int, int]) -> None:
    """One layer at a time: PEFT hands a wrong gradient on to what is below (g[k] meets w[n + k], not w[n − k])."""
    config = peft.C3AConfig(block_size=8, target_modules=["0"])
    pair(METHODS["c3a"](block_size=8), config, ("w", "c3a_kernel", same), sizes=(size,))


def test_the_gradient_that_c3a_hands_on() -> None:
    model, _ = ours(METHODS["c3a"](block_size=8), TALL, WIDE)
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model.double(), (x,))


def test_fourier_ft() -> None:
    """PEFT draws the places from a seed of its own and does not save them; here it gets ours."""
    model, deltas = ours(METHODS["fourier_ft"](coefficients=20, alpha=90.0), TALL, WIDE)
    config = peft.FourierFTConfig(n_frequency=20, scaling=90.0, target_modules=TARGETS)
    other, layers = theirs(config, TALL, WIDE)
    for delta, layer, (into, out) in zip(deltas, layers, (TALL, WIDE), strict=True):
        places = getattr(delta.shared, f"places_{out}_{into}")
        layer.indices["default"] = torch.stack([places // into, places % into])
    compare(
        model,
        other,
        [(d.c, layer.fourierft_spectrum["default"], same) for d, layer in zip(deltas, layers, strict=True)],
    )


def test_shira() -> None:
    model, deltas = ours(METHODS["shira"](rank=3), TALL, WIDE)
    other, layers = theirs(peft.ShiraConfig(r=3, target_modules=TARGETS), TALL, WIDE)
    for delta, layer, (into, _) in zip(deltas, layers, (TALL, WIDE), strict=True):
        layer.shira_indices["default"] = torch.stack([delta.index // into, delta.index % into])
    compare(
        model, other, [(d.value, layer.shira_weight["default"], same) for d, layer in zip(deltas, layers, strict=True)]
    )
