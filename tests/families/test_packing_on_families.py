"""Packed rows in the engine's fast pieces: the loss and gradients of rows alone, on all causal model types."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tests.engine.test_packing import alone, rows_with_common_beginnings
from tiny_models import BOTH_WAYS, WITH_A_HEAD, build, config, scramble

import trimtab as tt
from trimtab.core.errors import UserError
from trimtab.core.family import tables
from trimtab.data.packing import pack
from trimtab.engine.attention import can_pack, segments_in
from trimtab.engine.faster import running
from trimtab.engine.loss import loss_sum

NEVER = {
    "bloom": "its own attention",
    "falcon": "its own attention",
    "gemma2": "capped",
    "nemotron": "layers say nothing",
}
NEVER |= {"megatron-bert": "its own attention"}
"""Model types that are not packed, and why; those with both directions neither."""


def model_of(model_type: str) -> Any:
    """With room for long rows, weights small enough that attention looks at more than one token, and a LoRA."""
    sizes = config(model_type)
    for name in ("max_position_embeddings", "n_positions"):
        if hasattr(sizes, name):
            setattr(sizes, name, 128)
    model = scramble(transformers.AutoModelForCausalLM.from_config(sizes))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5 if parameter.ndim > 1 else 1.0)
        tt.attach(model, tt.LoRA(rank=4))
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("model_type", WITH_A_HEAD)
def test_a_pack_is_exact_or_not_made(model_type: str) -> None:
    model = model_of(model_type)
    both_ways = tables()[model_type].name in BOTH_WAYS
    if not can_pack(model, 64):
        assert both_ways or model_type in NEVER
        return
    assert not both_ways
    assert model_type not in NEVER
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = alone(model, rows_with_common_beginnings())
    wanted = torch.autograd.grad(expected, trained, allow_unused=True)
    scale = max(float(one.abs().max()) for one in wanted if one is not None)
    for share in (None, 4):
        with running(model, packed=True):
            loss, _ = loss_sum(model, pack(rows_with_common_beginnings(), share), "causal")
            found = torch.autograd.grad(loss, trained, allow_unused=True)
        torch.testing.assert_close(loss, expected, rtol=2e-5, atol=0)
        for one, other in zip(found, wanted, strict=True):
            assert (one is None) == (other is None)
            assert one is None or other is None or float((one - other).abs().max()) <= 2e-5 * scale


def test_a_model_that_keeps_the_ends_of_rows_from_its_attention_is_stopped() -> None:
    model = build("nemotron", "AutoModelForCausalLM")
    with segments_in(model), pytest.raises(UserError, match="was not told where rows end"):
        loss_sum(model, pack(rows_with_common_beginnings()[:2]), "causal")
    with segments_in(model):
        assert model(input_ids=torch.arange(3, 9)[None]).logits.shape[1] == 6
