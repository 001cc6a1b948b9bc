"""Dropout is on the adapter's own branch, in training only, and refused where a weight is read without an input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import trimtab as tt
from trimtab import laws

METHODS = [tt.LoRA(rank=3, dropout=0.5), tt.DoRA(rank=3, dropout=0.5), tt.QALoRA(rank=3, group_size=4, dropout=0.5)]


def moved(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("method", METHODS, ids=lambda one: type(one).__name__)
def test_dropout_is_for_training_only(method: Any) -> None:
    model = moved(tt.attach(nn.Sequential(nn.Linear(24, 20)), method, "0"))
    x = torch.randn(2, 5, 24)
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("rate", [0.3, 0.8])
def test_the_mean_over_masks_is_the_output_without(rate: float) -> None:
    model = moved(tt.attach(nn.Sequential(nn.Linear(24, 20)), tt.LoRA(rank=3, dropout=rate), "0"))
    x = torch.randn(1, 24)
    wanted = model.eval()(x)
    frozen = tt.activate(model, None)(x)
    tt.activate(model, "default").train()
    found = torch.stack([model(x) for _ in range(4000)]).mean(0)
    assert (found - wanted).abs().max() < 0.15 * (wanted - frozen).abs().max()


def test_only_the_branch_is_dropped() -> None:
    """With everything dropped what is left is the frozen layer, bias included."""
    model = nn.Sequential(nn.Linear(24, 20))
    x = torch.randn(2, 24)
    frozen = model(x)
    moved(tt.attach(model, tt.LoRA(rank=3, dropout=1.0), "0")).train()
    assert torch.equal(model(x), frozen)


@pytest.mark.parametrize("method", METHODS[:2], ids=lambda one: type(one).__name__)
def test_a_weight_that_is_read_raw_has_no_input_to_drop(method: Any) -> None:
    model = laws.hosts.TorchAttention()
    with pytest.raises(tt.UserError, match="dropout"):
        tt.attach(model, method, "q, v")
    assert not any(".delta." in name for name in model.state_dict())


def test_ids_are_not_dropped() -> None:
    model = moved(tt.attach(nn.Sequential(nn.Embedding(9, 6)), tt.LoRA(rank=2, dropout=0.5), "0")).train()
    ids = torch.arange(9)
    assert torch.equal(model(ids), model(ids))


def test_what_is_attached_to_a_model_in_eval_mode_is_in_eval_mode() -> None:
    """A model fresh from disk is in eval mode: an adapter loaded onto it must not drop anything."""
    model = moved(tt.attach(nn.Sequential(nn.Linear(24, 20)).eval(), tt.LoRA(rank=3, dropout=0.5), "0"))
    x = torch.randn(2, 5, 24)
    assert torch.equal(model(x), model(x))
