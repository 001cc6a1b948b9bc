"""Soft prompts and LLaMA-Adapter with the same tensors in PEFT: the same outputs and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.methods.test_peers import agree, gpt2, llama, moved, twins
from torch import Tensor, nn

import trimtab as tt

peft = pytest.importorskip("peft")
LENGTH = 5


def batch() -> dict[str, Tensor]:
    ids = torch.randint(0, 31, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(model: Any, inputs: dict[str, Tensor], skip: int = 0) -> Tensor:
    """Logits at real positions; PEFT's begin with those of its virtual tokens."""
    return model(**inputs).logits[:, skip:][inputs["attention_mask"].bool()]


def same(ours: Any, theirs: Any, pairs: dict[Tensor, Tensor], skip: int) -> None:
    inputs = batch()
    y, z = logits(ours, inputs), logits(theirs, inputs, skip)
    agree(y, z, "outputs")
    y.square().mean().backward()
    z.square().mean().backward()
    for mine, other in pairs.items():
        assert mine.grad is not None
        assert other.grad is not None
        agree(mine.grad.reshape(other.grad.shape), other.grad, f"gradient of {tuple(other.shape)}")


def copied(pairs: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    with torch.no_grad():
        for mine, other in pairs.items():
            other.copy_(mine.reshape(other.shape))
    return pairs


@pytest.mark.parametrize("make", [gpt2, llama])
def test_prompt_tuning(make: Any) -> None:
    ours, theirs = twins(make)
    tt.attach(ours, tt.PromptTuning(length=LENGTH))
    (P,) = moved(ours, 0.5).values()
    theirs = peft.get_peft_model(theirs, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH))
    same(ours, theirs, copied({P: theirs.prompt_encoder["default"].embedding.weight}), LENGTH)


@pytest.mark.parametrize("network", ["MLP", "LSTM"])
def test_p_tuning(network: str) -> None:
    ours, theirs = twins(llama)
    method = tt.PTuning(length=LENGTH, hidden=7) if network == "MLP" else tt.PTuningLSTM(length=LENGTH, hidden=7)
    tt.attach(ours, method)
    moved(ours, 0.2)
    config = {"encoder_reparameterization_type": network, "encoder_hidden_size": 7, "encoder_dropout": 0.0}
    config |= {"task_type": "CAUSAL_LM", "num_virtual_tokens": LENGTH, "encoder_num_layers": 2}
    theirs = peft.get_peft_model(theirs, peft.PromptEncoderConfig(**config))
    encoder = theirs.prompt_encoder["default"]
    p: Any = ours.get_input_embeddings().delta["default"]
    pairs = {p.E: encoder.embedding.weight}
    linears = [one for one in encoder.mlp_head if isinstance(one, nn.Linear)]
    for number, layer in enumerate(linears, 1):
        pairs |= {getattr(p, f"W{number}"): layer.weight, getattr(p, f"b{number}"): layer.bias}
    if network == "LSTM":
        pairs |= {getattr(p.lstm, name): value for name, value in encoder.lstm_head.named_parameters()}
    assert len(pairs) == {"MLP": 7, "LSTM": 21}[network]
    same(ours, theirs, copied(pairs), LENGTH)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_llama_adapter(make: Any) -> None:
    """PEFT has one gate a layer and no tanh: all of our gates are equal, and its gate is their tanh."""
    ours, theirs = twins(make)
    tt.attach(ours, tt.LLaMAAdapter(length=LENGTH), where="attention@-1:")
    (delta,) = [module.delta["default"] for module in ours.modules() if "delta" in module._modules]
    with torch.no_grad():
        delta.g.fill_(0.7)
    theirs = peft.get_peft_model(
        theirs, peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=LENGTH, adapter_layers=1)
    )
    (attention,) = [module for module in theirs.modules() if hasattr(module, "adaption_gate")]
    with torch.no_grad():
        attention.adaption_prompt.copy_(delta.P[None])
        attention.adaption_gate.fill_(torch.tanh(torch.tensor(0.7)))
    if make is gpt2:  # PEFT adds behind the output projection there, not before it as the paper does
        inputs = batch()
        assert not torch.allclose(logits(ours, inputs), logits(theirs, inputs))
        return
    same(ours, theirs, {delta.P: attention.adaption_prompt}, 0)
    slope = 1 - torch.tanh(delta.g[0].detach()) ** 2
    agree(delta.g.grad.sum()[None] / slope, attention.adaption_gate.grad, "gradient of the gate")
