"""Combining: sums are sums, the rules are their papers', and one adapter with weight 1 is untouched."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from tests.interop.conftest import logits, make

import trimtab as tt
from trimtab.core.errors import UserError
from trimtab.interop.combine import RULES, WAYS, combined
from trimtab.interop.saved import saved_of


def with_adapters(shape: str = "llama", **methods: Any) -> Any:
    model = make(shape)
    for seed, (name, (method, where)) in enumerate(methods.items()):
        tt.attach(model, method, where, name=name, seed=seed)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn_like(value))
    return model


def weights_of(model: Any, name: str | None) -> dict[str, torch.Tensor]:
    """The weights of a model with one of its adapters merged, or of the base alone."""
    twin = copy.deepcopy(model)
    for other in [one for one in twin.__dict__["_trimtab"].adapters if one != name]:
        tt.detach(twin, other)
    if name is not None:
        tt.merge(twin, name)
    return {key: value.double() for key, value in twin.state_dict().items()}


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize(
    "method", [tt.LoRA(rank=2), tt.DoRA(rank=2), tt.IA3(), tt.LoKr(rank=2)], ids=["lora", "dora", "ia3", "lokr"]
)
def test_one_adapter_of_weight_one_is_untouched_bit_for_bit(how: str, method: Any) -> None:
    model = with_adapters(a=(method, "v, down"))
    before, saved = logits(model), saved_of(model, "a")
    tt.combine(model, ["a"], how, [1.0])
    assert torch.equal(logits(model), before)
    again = saved_of(model, "combined")
    assert again.tensors.keys() == saved.tensors.keys()
    assert all(torch.equal(again.tensors[key], saved.tensors[key]) for key in saved.tensors)


@pytest.mark.parametrize("how", ["sum", "cat", "svd"])
@pytest.mark.parametrize("shape", ["llama", "gpt2", "neox"])
def test_a_sum_is_the_weighted_sum_of_the_changes(how: str, shape: str) -> None:
    other = (tt.LoKr(rank=2) if how == "svd" else tt.RsLoRA(rank=3), "q, down")
    model = with_adapters(shape, a=(tt.LoRA(rank=2), "q, v"), b=other)
    base = weights_of(model, None)
    a, b = weights_of(model, "a"), weights_of(model, "b")
    tt.combine(model, ["a", "b"], how, [0.5, -2.0], name="c")
    found = weights_of(model, "c")
    for key in base:
        wanted = base[key] + 0.5 * (a[key] - base[key]) - 2.0 * (b[key] - base[key])
        assert torch.allclose(found[key], wanted, atol=2e-6), key


def oracle(how: str, changes: np.ndarray, weights: np.ndarray, density: float) -> np.ndarray:
    """TIES and magnitude pruning entry by entry, from their papers."""
    kept = np.zeros_like(changes)
    for i, change in enumerate(changes):
        keep = max(1, round(density * change.size))
        bar = np.sort(np.abs(change).ravel())[-keep]
        kept[i] = np.where(np.abs(change) >= bar, change, 0)
    if how == "magnitude_prune":
        return np.einsum("i,i...->...", weights, kept)
    result = np.zeros(changes.shape[1:])
    for at in np.ndindex(*result.shape):
        values = weights * kept[(slice(None), *at)]
        sign = np.sign(values.sum())
        agreeing = [i for i in range(len(values)) if values[i] and np.sign(values[i]) == sign]
        if agreeing:
            total = sum(values[i] for i in agreeing)
            result[at] = total * np.abs(weights).sum() / sum(abs(weights[i]) for i in agreeing)
    return result


@pytest.mark.parametrize("how", ["ties", "magnitude_prune"])
@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
def test_rules_equal_their_papers(how: str, density: float) -> None:
    changes = np.random.default_rng(0).standard_normal((3, 5, 4))
    weights = np.array([1.0, 0.5, -1.5])
    got = RULES[how](torch.from_numpy(changes), torch.from_numpy(weights), density, torch.Generator())
    assert np.allclose(got.numpy(), oracle(how, changes, weights, density), atol=1e-12)


def test_dare_keeps_a_share_and_the_expectation() -> None:
    changes = torch.ones(1, 400, 400, dtype=torch.double)
    got = RULES["dare"](changes, torch.ones(1, dtype=torch.double), 0.25, torch.Generator().manual_seed(1))
    assert set(got.unique().tolist()) == {0.0, 4.0}
    assert abs(float(got.mean()) - 1.0) < 0.02
    two = torch.cat([changes, -changes])
    assert set(
        RULES["dare_ties"](two, torch.ones(2, dtype=torch.double), 1.0, torch.Generator()).unique().tolist()
    ) == {0.0}


def test_a_rank_that_is_too_small_is_measured() -> None:
    model = with_adapters(a=(tt.LoRA(rank=4), "q"), b=(tt.LoRA(rank=4), "q"))
    adapters = [saved_of(model, name) for name in ("a", "b")]
    _, exact = combined(model, adapters, "svd")
    _, cut = combined(model, adapters, "svd", rank=2)
    assert max(fit.error for fit in exact) == 0.0
    assert all(0 < fit.error < 1 and fit.kept == 2 for fit in cut)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"how": "tise"}, "is none of"),
        ({"weights": [1.0]}, "1 weights for 2 adapters"),
        ({"density": 0.0}, "is no share"),
    ],
)
def test_wrong_settings_are_refused(change: dict[str, Any], message: str) -> None:
    model = with_adapters(a=(tt.LoRA(rank=2), "q"), b=(tt.LoRA(rank=2), "v"))
    with pytest.raises(UserError, match=message):
        tt.combine(model, ["a", "b"], **change)


def test_an_adapter_that_changes_no_weight_is_refused() -> None:
    model = with_adapters(a=(tt.LoRA(rank=2), "q"), b=(tt.Houlsby(bottleneck=2), "ffn"))
    with pytest.raises(UserError, match="Houlsby changes no weight"):
        tt.combine(model, ["a", "b"])
