"""Pruning, and retraining a little afterwards: the zeros are the right ones, and merging leaves them where they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import trimtab as tt
from trimtab.laws.decoder import Decoder
from trimtab.laws.judging import move


def batch(rows: int = 5) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 29, (rows, 7))}


def loss(model: Any, row: Any) -> torch.Tensor:
    logits = model(**row)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), row["input_ids"][:, 1:].flatten())


def decoder() -> Any:
    torch.manual_seed(0)
    return Decoder()


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {place.name: model.get_submodule(place.module) for place in tt.select(model, "all-linear")}  # type: ignore[misc]


def zeros(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: module.weight.detach() == 0 for name, module in linears(model).items()}


def test_magnitude_pruning_takes_the_smallest_of_each_matrix() -> None:
    model = decoder()
    before = {name: module.weight.detach().clone() for name, module in linears(model).items()}
    tt.prune(model, 0.37)
    for name, module in linears(model).items():
        W = before[name].numpy()
        order = np.argsort(np.abs(W), axis=None, kind="stable")[: int(0.37 * W.size)]
        expected = W.copy().reshape(-1)
        expected[order] = 0
        assert (module.weight.detach().numpy().reshape(-1) == expected).all()


def test_wanda_compares_weights_times_input_norms_within_a_row() -> None:
    model = decoder()
    before = {name: module.weight.detach().clone() for name, module in linears(model).items()}
    rows = batch()
    seen: dict[str, list[np.ndarray]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda m, args, name=name: seen.setdefault(name, []).append(args[0].numpy()))
        for name, module in linears(model).items()
    ]
    with torch.no_grad():
        model(**rows)
    for hook in hooks:
        hook.remove()
    tt.prune(model, 0.5, covariance=tt.covariance(model, [rows]))
    for name, module in linears(model).items():
        x = np.concatenate([one.reshape(-1, one.shape[-1]) for one in seen[name]]).astype(np.float64)
        score = np.abs(before[name].numpy()) * np.sqrt((x**2).sum(0))
        for n, row in enumerate(score):
            gone = set(np.argsort(row)[: len(row) // 2].tolist())
            assert set(np.flatnonzero(module.weight.detach().numpy()[n] == 0).tolist()) == gone


def test_two_of_four() -> None:
    model = decoder()
    tt.prune(model, 0.5, "up", of=4)
    for name, mask in zeros(model).items():
        if name.endswith("up_proj"):
            assert (mask.view(-1, 4).sum(1) == 2).all()
        else:
            assert not mask.any()


def test_pruning_twice_is_pruning_once() -> None:
    model = tt.prune(decoder(), 0.5)
    once = {name: value.clone() for name, value in model.state_dict().items()}
    tt.prune(model, 0.5)
    assert all(torch.equal(value, once[name]) for name, value in model.state_dict().items())


def test_gpt2_layers_are_pruned_by_their_inputs() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nf, self.weight, self.bias = 6, nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.zeros(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight + self.bias

    model = nn.Sequential(Conv1D())
    tt.prune(model, 0.5, "0", of=4)
    assert ((model[0].weight == 0).T.reshape(-1, 4).sum(1) == 2).all()


@pytest.mark.parametrize(
    ("ready", "settings", "message"),
    [
        (lambda model: model, {"sparsity": 1.0}, "sparsity=1.0"),
        (lambda model: tt.quantize(model, tt.NF4(), where="down@1"), {}, "down_proj is quantized"),
        (lambda model: tt.attach(model, tt.LoRA(), "down@1"), {}, "down_proj has adapters"),
        (lambda model: model, {"covariance": {}}, "has no covariance"),
        (lambda model: model, {"of": 7}, "no multiple of 7"),
    ],
)
def test_what_cannot_be_pruned_is_told_before_anything_changes(ready: Any, settings: Any, message: str) -> None:
    model = ready(decoder())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(tt.UserError, match=message):
        tt.prune(model, **settings)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


RETRAINERS = {
    "perp": tt.PERP(),
    "mask_lora": tt.MaskLoRA(rank=4),
    "scale_lora": tt.ScaleLoRA(rank=4),
}


@pytest.mark.parametrize("kind", ["dense", "bf16", "pruned", "n_of_m"])
@pytest.mark.parametrize("name", RETRAINERS)
def test_merging_keeps_the_sparsity_pattern_exactly(name: str, kind: str) -> None:
    model = tt.prune(decoder(), 0.5, of=4)
    if kind == "bf16":
        model = model.to(torch.bfloat16)
    mask = zeros(model)
    assert all(one.sum() * 2 == one.numel() for one in mask.values())
    if kind in ("pruned", "n_of_m"):
        tt.quantize(model, tt.Pruned(0.5, "float32") if kind == "pruned" else tt.NOfM(dtype="float32"))
    tt.attach(model, RETRAINERS[name])
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.02)
    rows = batch()
    first = loss(model, rows).item()
    for _ in range(4):
        optimizer.zero_grad()
        loss(model, rows).backward()
        optimizer.step()
    assert loss(model, rows).item() < first
    with torch.no_grad():
        output = model(**rows)
        requantized = kind in ("pruned", "n_of_m") and name != "perp"
        tt.merge(model, quantized="requantize" if requantized else "exact")
        if kind != "bf16":
            torch.testing.assert_close(model(**rows), output, rtol=1e-5, atol=1e-5)
    found = zeros(model)
    assert all(torch.equal(found[key], mask[key]) for key in mask)


def test_plain_lora_does_not_keep_it() -> None:
    model = tt.prune(decoder(), 0.5)
    mask = zeros(model)
    tt.merge(move(tt.attach(model, tt.LoRA(rank=4))))
    assert not any(torch.equal(zeros(model)[key], mask[key]) for key in mask)


def test_mask_lora_is_lora_where_nothing_is_pruned_and_stays_at_zero_elsewhere() -> None:
    rows = batch()
    with torch.no_grad():
        ours, theirs = (move(tt.attach(decoder(), one, "q"))(**rows) for one in (tt.MaskLoRA(4, 8.0), tt.LoRA(4, 8.0)))
    torch.testing.assert_close(ours, theirs)
    model = tt.prune(decoder(), 0.5, "q")
    method, W = tt.MaskLoRA(4, 8.0), model.model.layers[0].self_attn.q_proj.weight.detach()
    tt.attach(model, method, "q")
    move(model)
    p = model.model.layers[0].self_attn.q_proj.delta["default"]
    changed = method.weight(W, p) - W
    expected = np.where(W.numpy() == 0, 0, 2.0 * p.B.detach().numpy() @ p.A.detach().numpy())
    np.testing.assert_allclose(changed.detach().numpy(), expected, atol=1e-6)


def test_scale_lora_stays_of_rank_one() -> None:
    """What its docstring says of the official start: all components are equal and stay so."""
    model = tt.attach(decoder(), tt.ScaleLoRA(rank=4), "q")
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model, batch()).backward()
        optimizer.step()
    p = model.model.layers[0].self_attn.q_proj.delta["default"]
    assert (p.A - p.A.mean()).abs().max() > 1e-3
    assert torch.linalg.matrix_rank((p.B @ p.A).double(), rtol=1e-5) == 1


def test_perp_trains_biases_and_norms_only() -> None:
    model = tt.attach(decoder(), tt.PERP())
    names = {name.rsplit(".", 1)[-1] for name, one in model.named_parameters() if one.requires_grad}
    assert names <= {"d", "g"}
    assert sum(one.numel() for one in model.parameters() if one.requires_grad) < 0.1 * sum(
        one.numel() for one in model.parameters()
    )
