"""Merging into quantized weights: QA-LoRA into zero points, exactly; what cannot is refused or made dense by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trimtab as tt
from trimtab.laws.decoder import Decoder


def moved(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def quantized(format: Any) -> Any:
    torch.manual_seed(0)
    return tt.quantize(Decoder().eval(), format)


def coded(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if ".code." in name}


IDS = torch.arange(26).view(2, 13)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [4, 8])
def test_qa_lora_merges_into_zero_points(bits: int, size: int) -> None:
    model = quantized(tt.Affine(code_bits=bits, group_size=size))
    before, frozen = coded(model), model(IDS)
    moved(tt.attach(model, tt.QALoRA(rank=3, group_size=size)))
    y = model(IDS)
    assert not torch.allclose(y, frozen, atol=1e-2)
    tt.merge(model)
    assert (model(IDS) - y).abs().max() <= 1e-5 * y.abs().max()
    after = coded(model)
    assert list(after) == list(before)
    for name, value in after.items():
        assert torch.equal(value, before[name]) is not name.endswith("zero"), name
    assert all(value.dtype == before[name].dtype for name, value in after.items())


def test_qa_lora_in_groups_of_another_size_is_refused() -> None:
    model = quantized(tt.Affine(group_size=4))
    with pytest.raises(tt.UserError, match="group_size=4"):
        tt.attach(model, tt.QALoRA(group_size=8))


@pytest.mark.parametrize("format", [tt.NF4(), tt.NF4(double=True), tt.Absmax()], ids=repr)
def test_a_merge_that_is_not_exact_has_to_be_asked_for(format: Any) -> None:
    model = moved(tt.attach(quantized(format), tt.LoRA(rank=3)))
    y, before = model(IDS), coded(model)
    with pytest.raises(tt.UserError, match="quantized") as told:
        tt.merge(model)
    assert "dense" in str(told.value)
    assert torch.equal(model(IDS), y)
    assert all(torch.equal(value, before[name]) for name, value in coded(model).items())
    tt.merge(model, quantized="dense")
    assert not coded(model)
    assert (model(IDS) - y).abs().max() <= 1e-5 * y.abs().max()


def test_a_bias_merges_beside_a_quantized_weight() -> None:
    model = moved(tt.attach(quantized(tt.NF4()), tt.OutputBias()))
    y, before = model(IDS), coded(model)
    tt.merge(model)
    torch.testing.assert_close(model(IDS), y)
    assert all(torch.equal(value, before[name]) for name, value in coded(model).items())


def test_requantizing_keeps_the_format_and_stays_near() -> None:
    model = moved(tt.attach(quantized(tt.Absmax()), tt.LoRA(rank=3)))
    y, before = model(IDS), coded(model)
    tt.merge(model, quantized="requantize")
    assert list(coded(model)) == list(before)
    assert (model(IDS) - y).abs().max() <= 0.05 * y.abs().max()


def test_an_adapter_trained_on_codes_merges_into_the_dense_model(tmp_path: Any) -> None:
    """The usual end of QLoRA: trained on NF4, merged into the original weights; DoRA's norms are theirs."""
    for method in (tt.LoRA(rank=3), tt.DoRA(rank=3)):
        model = moved(tt.attach(quantized(tt.NF4()), method))
        tt.save(model, tmp_path)
        torch.manual_seed(0)
        dense = tt.load(Decoder().eval(), tmp_path)
        y = dense(IDS)
        tt.merge(dense)
        assert (dense(IDS) - y).abs().max() <= 1e-5 * y.abs().max()
