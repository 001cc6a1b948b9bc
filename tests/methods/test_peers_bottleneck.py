"""The same tensors in AdapterHub's library give the same outputs and gradients, where it can be imported."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import trimtab as tt

adapters = pytest.importorskip("adapters")
transformers = pytest.importorskip("transformers")

RTOL = 1e-5
SIZES = {"vocab_size": 31, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}


def model_of(kind: str) -> Any:
    torch.manual_seed(3)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=31, n_embd=24, n_layer=2, n_head=4, n_positions=40)
        model = transformers.GPT2Model(config)
    elif kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(**SIZES, intermediate_size=40))
    else:
        config = transformers.LlamaConfig(**SIZES, intermediate_size=40, num_key_value_heads=2)
        model = transformers.LlamaModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def theirs(model: Any, config: Any) -> Any:
    adapters.init(model)
    model.add_adapter("a", config=config)
    model.train_adapter("a")
    model.set_active_adapters("a")
    return model.eval()


METHODS = {
    "pfeiffer": (lambda: tt.Pfeiffer(bottleneck=6), lambda: adapters.SeqBnConfig(reduction_factor=4)),
    "parallel": (lambda: tt.Parallel(bottleneck=6), lambda: adapters.ParBnConfig(reduction_factor=4)),
    "houlsby": (
        lambda: tt.Houlsby(bottleneck=6),
        lambda: adapters.DoubleSeqBnConfig(reduction_factor=4, non_linearity="gelu"),
    ),
    "compacter": (
        lambda: tt.Compacter(bottleneck=8),
        lambda: adapters.CompacterConfig(reduction_factor=3, phm_dim=4),
    ),
}


def pairs_of(ours: nn.Module, other: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Our parameters beside theirs, by layer, sub-layer and place in the bottleneck."""

    def where(name: str) -> tuple[int, bool]:
        layer = re.search(r"\.(\d+)\.|^(\d+)\.|h\.(\d+)|layers?\.(\d+)", name)
        assert layer is not None
        return int(next(filter(None, layer.groups()))), "attention" in name or "attn" in name

    found: dict[tuple[int, bool], dict[str, nn.Parameter]] = {}
    for name, parameter in other.named_parameters():
        if ".adapters.a." in name:
            found.setdefault(where(name), {})[name.split(".adapters.a.")[1]] = parameter
    pairs = []
    for name, module in ours.named_modules():
        if type(module).__name__ != "Delta":
            continue
        there = found.pop(where(name))
        if hasattr(module, "D"):
            names = {"D": "down.0.weight", "d": "down.0.bias", "U": "up.weight", "u": "up.bias"}
        else:
            names = {f"down.{a}": f"down.0.{b}" for a, b in (("S", "W_left"), ("T", "W_right"), ("b", "b"))}
            names |= {f"up.{a}": f"up.{b}" for a, b in (("S", "W_left"), ("T", "W_right"), ("b", "b"))}
        mine = dict(module.named_parameters())
        pairs += [(mine[one], there[f"adapter_{two}"]) for one, two in names.items()]
    assert not found
    rules = [parameter for name, parameter in other.named_parameters() if "phm_rule" in name]
    pairs += [(parameter, rules[0]) for name, parameter in ours.named_parameters() if name.endswith(".A")]
    return pairs


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("name", METHODS)
def test_adapterhub_computes_the_same(name: str, kind: str) -> None:
    method, config = METHODS[name]
    ours, other = tt.attach(model_of(kind), method()), theirs(model_of(kind), config())
    pairs = pairs_of(ours, other)
    assert len(pairs) >= 8
    with torch.no_grad():
        for mine, hers in pairs:
            mine.copy_(0.3 * torch.randn_like(mine))
            hers.copy_(mine)
    ids = torch.randint(1, 31, (2, 9))
    y, z = (model(input_ids=ids).last_hidden_state for model in (ours, other))
    assert (y - z).abs().max() <= RTOL * z.abs().max()
    y.pow(3).mean().backward()
    z.pow(3).mean().backward()
    for mine, hers in pairs:
        assert (mine.grad - hers.grad).abs().max() <= RTOL * hers.grad.abs().max()
