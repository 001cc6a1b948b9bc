"""Compiled blocks change no gradient, are compiled once for packs of any length, and leave nothing behind."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from tests.engine.test_checkpointing import MODELS, agree, ready
from tests.engine.test_packing import rows_with_common_beginnings
from torch import nn
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

import trimtab as tt
from trimtab.core.errors import UserError
from trimtab.data.batches import collate
from trimtab.data.packing import pack
from trimtab.engine import regional
from trimtab.engine.attention import NAME, segment_attention
from trimtab.engine.faster import running
from trimtab.engine.loss import loss_sum
from trimtab.train.recipe import Recipe, recipe_from
from trimtab.train.updates import Point, refuse, rule_of

PAIRS = [("llama", "prefix"), ("qwen", "full"), ("gpt2", "houlsby"), ("llama", "hira")]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def untranslated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated ahead of time as always, but run by torch's own operators: no C++ is compiled."""
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **how: plain(call, **{**how, "backend": "aot_eager"}))


def gradients(model: nn.Module, batch: Any, **how: Any) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    with running(model, packed=not isinstance(batch, dict), pieces=(), **how):
        loss_sum(model, batch, "causal")[0].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_gradients_are_the_same(name: str, method: str, untranslated: None) -> None:
    model = ready(name, method)
    for batch in (pack(rows_with_common_beginnings(), 1), collate(rows_with_common_beginnings(), 0)):
        agree(gradients(model, batch, compile="blocks"), gradients(model, batch))
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["block", "sqrt"])
def test_checkpointed_too(policy: str, untranslated: None) -> None:
    model, batch = ready("llama", "lora"), pack(rows_with_common_beginnings(), 1)
    agree(gradients(model, batch, compile="blocks", policy=policy), gradients(model, batch))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch needs a C++ compiler")
def test_by_the_compiler_of_the_machine() -> None:
    model, batch = ready("llama", "lora"), pack(rows_with_common_beginnings(), 1)
    agree(gradients(model, batch, compile="blocks"), gradients(model, batch))


@pytest.mark.slow
def test_more_blocks_and_other_lengths_are_no_further_programs(untranslated: None) -> None:
    rows, found = rows_with_common_beginnings(), []
    for layers in (2, 4):
        torch._dynamo.reset()
        counters.clear()
        config = LlamaConfig.from_dict(MODELS["llama"]().config.to_dict() | {"num_hidden_layers": layers})
        model = tt.attach(LlamaForCausalLM(config), tt.LoRA(rank=2)).train()
        with running(model, packed=True, pieces=(), compile="blocks"):
            for count in (2, 3, len(rows)):
                loss_sum(model, pack(rows[:count], 1), "causal")[0].backward()
                found.append(counters["stats"]["unique_graphs"])
    assert found[0] > 0
    assert len(set(found)) == 1


@pytest.mark.slow
def test_measuring_is_not_compiled_and_all_is_as_before_afterwards(untranslated: None) -> None:
    from transformers import AttentionInterface

    model, batch = ready("llama", "lora"), pack(rows_with_common_beginnings(), 1)
    classes = [type(module) for module in model.modules()]
    with running(model, packed=True, pieces=("varlen",), compile="blocks"):
        assert AttentionInterface()[NAME] is not segment_attention
        model.eval()
        with torch.no_grad():
            loss_sum(model, batch, "causal")
    assert counters["stats"]["unique_graphs"] == 0
    assert AttentionInterface()[NAME] is segment_attention
    assert [type(module) for module in model.modules()] == classes
    assert not any("_trimtab_program" in module.__dict__ for module in model.modules())


def test_what_torch_cannot_compile_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **how: plain(call, **{**how, "backend": failing}))
    with pytest.raises(UserError, match=r"could not compile a .*DecoderLayer.*no compiler here") as caught:
        gradients(ready("llama", "lora"), pack(rows_with_common_beginnings(), 1), compile="blocks")
    assert "compile: off" in str(caught.value)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="no stack of blocks"), regional.compiled(nn.Linear(2, 2)):
        pass


@pytest.mark.parametrize(
    ("changed", "method", "told"),
    [
        ({"checkpointing": "selective"}, "lora", "compile does not go with checkpointing: selective"),
        ({"shard": "full"}, "lora", "compile does not go with shard"),
        ({}, "full_int8", "compile does not go with a method that cannot be compiled"),
    ],
)
def test_what_it_does_not_go_with(changed: dict[str, str], method: str, told: str) -> None:
    asked: Recipe = recipe_from({"model": "m", "data": "d", "compile": "blocks", **changed})
    model = tt.attach(MODELS["llama"](), tt.LoRA(rank=2))
    with pytest.raises(UserError, match=told):
        refuse(Point(asked, rule_of(asked), None, [tt.methods()[method]()], model, 2))


def test_other_tools_switch_it_on_and_off() -> None:
    said = [recipe_from({"model": "m", "data": "d", "torch_compile": value}).compile for value in (True, "false", "no")]
    assert said == ["blocks", "off", "off"]
    with pytest.raises(UserError, match="compile: 'all' is not one of off, blocks"):
        recipe_from({"model": "m", "data": "d", "compile": "all"})
