"""FISH mask: Fisher information one example at a time, one ranking over all sites, an exact budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trimtab as tt
from trimtab.core.sparse import sparse_linear
from trimtab.laws.decoder import Decoder


def batch(rows: int = 5) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 29, (rows, 7))}


def loss(model: Any, row: Any) -> torch.Tensor:
    logits = model(**row)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), row["input_ids"][:, 1:].flatten())


def test_fisher_is_the_sum_of_squares_of_single_gradients() -> None:
    torch.manual_seed(0)
    model = Decoder()
    model.model.layers[0].mlp.requires_grad_(False)
    model.train()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    rows = batch()
    found = tt.fisher(
        model,
        [{key: value[:2] for key, value in rows.items()}, {key: value[2:] for key, value in rows.items()}],
        "q, up",
        loss=loss,
    )
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert model.training
    assert set(found) == {f"model.layers.{n}.{name}" for n in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")}
    model.requires_grad_(True)
    for name, total in found.items():
        W = model.get_submodule(name).weight
        wanted = torch.zeros_like(W)
        for row in range(5):
            one = {key: value[row : row + 1] for key, value in rows.items()}
            wanted += torch.autograd.grad(loss(model, one), W)[0].square()
        torch.testing.assert_close(total, wanted)


@pytest.mark.parametrize("density", [0.001, 0.01, 0.037, 0.5])
def test_the_budget_is_exact_and_global(density: float) -> None:
    torch.manual_seed(0)
    model = Decoder()
    measured = tt.fisher(model, [batch()], loss=loss)
    tt.attach(model, tt.FishMask(density=density), statistics=measured)
    kept = {name: module.delta["default"] for name, module in model.named_modules() if "delta" in module._modules}
    total = sum(F.numel() for F in measured.values())
    assert sum(delta.index.numel() for delta in kept.values()) == int(density * total)
    ranked = torch.cat([F.flatten() for F in measured.values()]).sort(descending=True).values
    least = ranked[int(density * total) - 1]
    for name, delta in kept.items():
        F = measured[name].flatten()
        assert bool((F[delta.index] >= least).all()), name
        assert int((least < F).sum()) <= delta.index.numel(), name
        assert delta.index.unique().numel() == delta.index.numel()
        assert delta.value.numel() == delta.index.numel()
    shares = {delta.index.numel() / measured[name].numel() for name, delta in kept.items()}
    assert density == 0.5 or len(shares) > 1, "every site got the same share, so the ranking was not global"


def test_only_the_chosen_entries_move_and_merging_shows_it() -> None:
    torch.manual_seed(0)
    model = Decoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measured = tt.fisher(model, [batch()], loss=loss)
    tt.attach(model, tt.FishMask(density=0.01), statistics=measured)
    kept = {name: module.delta["default"].index for name, module in model.named_modules() if "delta" in module._modules}
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.1)
    for _ in range(3):
        loss(model, batch()).backward()
        optimizer.step()
    tt.merge(model)
    for name, value in model.state_dict().items():
        changed = (value != before[name]).flatten().nonzero().flatten()
        wanted = kept.get(name.removesuffix(".weight"), torch.tensor([], dtype=torch.long))
        assert torch.equal(changed, wanted.sort().values), name


def test_without_statistics_it_says_how_to_get_them() -> None:
    with pytest.raises(tt.UserError, match=r"trimtab\.fisher"):
        tt.attach(Decoder(), tt.FishMask())


def test_quantized_weights_have_no_fisher_information() -> None:
    model = tt.quantize(Decoder(), tt.NF4())
    with pytest.raises(tt.UserError, match="quantized"):
        tt.fisher(model, [batch()], loss=loss)


@pytest.mark.parametrize("count", [0, 1, 17, 200])
def test_the_sparse_product_is_the_dense_one(count: int) -> None:
    torch.manual_seed(0)
    shape = (11, 19)
    index = torch.randperm(11 * 19)[:count].sort().values
    value = torch.randn(count, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, 19, dtype=torch.float64, requires_grad=True)

    def dense(x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return x @ torch.zeros(11 * 19, dtype=torch.float64).index_add(0, index, value).view(shape).mT

    y, z = sparse_linear(x, value, index, shape), dense(x, value)
    torch.testing.assert_close(y, z)
    probe = torch.randn_like(y)
    found = torch.autograd.grad((y * probe).sum(), (x, value))
    wanted = torch.autograd.grad((z * probe).sum(), (x, value))
    torch.testing.assert_close(found, wanted)
