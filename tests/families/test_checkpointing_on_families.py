"""Every policy of checkpointing gives the gradients without it, on the tiny models of every family."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from tiny_models import build
from torch import Tensor, nn

import trimtab as tt
from trimtab.core.errors import UserError
from trimtab.core.family import tables
from trimtab.core.modes import dropout_rates
from trimtab.engine import selective
from trimtab.engine.checkpointing import checkpointing

IDS = torch.arange(3, 11).view(1, 8).repeat(2, 1)
TEXT = [name for name, table in tables().items() if table.name not in ("vit", "sam")]
ONE_THING = {
    **dict.fromkeys(("t5", "mt5", "bloom", "megatron-bert", "imagegpt"), "hand on more"),
    **dict.fromkeys(("gemma2", "gpt_oss"), "called alike"),
}
"""Why the blocks of a model type cannot run as groups, where they cannot."""


def gradients(model: nn.Module, policy: str) -> dict[str, Tensor]:
    """Of every trained tensor, of a sum that no norm at the end makes constant."""
    given: dict[str, Any] = {"input_ids": IDS}
    if getattr(model.config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = IDS[:, :5]
    if "use_cache" in inspect.signature(model.forward).parameters:
        given["use_cache"] = False
    model.zero_grad()
    with checkpointing(model, policy):
        out = model(**given)[0]
    out.double().tanh().mul(torch.linspace(-1, 1, out.shape[-1], dtype=torch.float64)).sum().backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def lora() -> Any:
    return tt.LoRA(rank=2)


def prefix_beside_adapters() -> Any:
    """A network outside the blocks makes the prefixes, so torch's own checkpoint runs them again."""
    return [tt.Gated(inner=tt.Pfeiffer(bottleneck=4)).at("stream"), tt.PrefixTuning(length=2, hidden=8).at("k, v")]


@pytest.mark.parametrize("method", [lora, prefix_beside_adapters])
@pytest.mark.parametrize("model_type", TEXT)
def test_no_policy_changes_a_gradient(model_type: str, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(model_type)
    tt.attach(model, method())
    with torch.no_grad():
        for one in model.parameters():
            if one.requires_grad:
                one.normal_(std=0.1, generator=torch.Generator().manual_seed(4))
    for module in model.train().modules():
        for name, _ in list(dropout_rates(module)):
            setattr(module, name, 0.0)
    monkeypatch.setattr(selective, "LEAST", 1)
    wanted = gradients(model, "off")
    assert any(float(one.abs().max()) > 0 for one in wanted.values())
    for policy in ("block", "sqrt", "selective", "offload"):
        if policy == "sqrt" and model_type in ONE_THING:
            with pytest.raises(UserError, match=ONE_THING[model_type]):
                gradients(model, policy)
            continue
        found = gradients(model, policy)
        assert found.keys() == wanted.keys()
        for name, one in wanted.items():
            torch.testing.assert_close(found[name], one, rtol=1e-4, atol=1e-5 * float(one.abs().max()), msg=name)
