"""Schedules of what trains: the layers they choose, the memory they free, and that a resumed run goes on alike."""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab.core.active import members_of
from trimtab.core.errors import UserError
from trimtab.core.registry import find, from_json, names, to_json

SCHEDULES = {"lisa": {"layers": 2, "every": 3}, "badam": {"every": 3}, "gradual_unfreezing": {"every": 3}}


def schedule(name: str) -> tt.Active:
    return find(name, "active")(**SCHEDULES[name])


def llama(layers: int = 5) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 17, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False, use_cache=False))


IDS = torch.arange(12).view(2, 6)


def step(model: nn.Module, driver: torch.optim.Optimizer, activity: tt.Activity, at: int) -> None:
    activity.at(at)
    model(input_ids=IDS, labels=IDS).loss.backward()
    driver.step()
    driver.zero_grad()


def bare(rule: str | tt.Transform = "adamw", name: str = "lisa", model: nn.Module | None = None) -> tuple[Any, ...]:
    model = model or llama()
    driver = tt.Optimizer(model, rule, lr=0.01)
    return model, driver, tt.Activity(model, schedule(name), driver, seed=4)


def test_every_schedule_is_tested_here() -> None:
    assert set(SCHEDULES) == set(names("active"))


@pytest.mark.parametrize("name", SCHEDULES)
def test_it_says_what_it_is(name: str) -> None:
    made = schedule(name)
    text = inspect.getdoc(type(made)) or ""
    assert text.startswith("on(t) = ")
    assert "bytes" in text
    assert f"arXiv {type(made).paper}" in text
    assert from_json(to_json(made)) == made
    assert getattr(tt, type(made).__name__) is type(made)


def test_parameters_belong_to_the_block_their_path_runs_through() -> None:
    layers, members = members_of(llama())
    assert layers == 5
    found = {member.name: member.layer for member in members}
    assert found["model.embed_tokens.weight"] == -1
    assert found["model.layers.3.mlp.down_proj.weight"] == 3
    assert found["model.norm.weight"] == found["lm_head.weight"] == 5
    adapted = tt.attach(llama(), [tt.LoRA(rank=2).at("q"), tt.Full().at("embed, head")])
    layers, members = members_of(adapted)
    assert layers == 5
    assert Counter(member.layer for member in members) == Counter({-1: 1, **{at: 2 for at in range(5)}, 5: 1})


def test_lisa_always_trains_the_outside_and_draws_every_layer_alike() -> None:
    rule = tt.LISA(layers=2, every=7)
    drawn: Counter[int] = Counter()
    for turn in range(600):
        chosen = rule.on(7 * turn, 6, seed=1)
        assert chosen == rule.on(7 * turn + 6, 6, seed=1)
        assert {-1, 6} < chosen
        assert len(chosen) == 4
        drawn.update(chosen - {-1, 6})
    assert all(150 < drawn[layer] < 250 for layer in range(6))
    assert rule.on(0, 6, seed=1) != rule.on(0, 6, seed=2) or rule.on(7, 6, seed=1) != rule.on(7, 6, seed=2)


@pytest.mark.parametrize("order", ["random", "ascending", "descending"])
def test_badam_visits_every_block_once_a_round(order: str) -> None:
    rule = tt.BAdam(every=2, order=order)
    rounds = [[next(iter(rule.on(2 * (5 * turn + at), 5, seed=3))) for at in range(5)] for turn in range(9)]
    assert all(sorted(visits) == [0, 1, 2, 3, 4] for visits in rounds)
    if order == "random":
        assert len({tuple(visits) for visits in rounds}) > 6
    else:
        assert rounds[0] == ([0, 1, 2, 3, 4] if order == "ascending" else [4, 3, 2, 1, 0])
    assert tt.BAdam(outside=True).on(0, 5, 0) >= {-1, 5}


def test_gradual_unfreezing_goes_down_to_the_embedding() -> None:
    rule = tt.GradualUnfreezing(every=2)
    assert [min(rule.on(at, 3, 0)) for at in range(10)] == [2, 2, 1, 1, 0, 0, -1, -1, -1, -1]
    assert all(max(rule.on(at, 3, 0)) == 3 for at in range(10))


@pytest.mark.parametrize("rule", ["adamw", "adafactor", "torch"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_only_what_is_on_moves_and_only_it_has_a_state(name: str, rule: str) -> None:
    model, driver, activity = bare("adamw" if rule == "torch" else rule, name)
    made = driver.rule
    if rule == "torch":
        driver = torch.optim.AdamW(model.parameters(), lr=0.01)
        activity = tt.Activity(model, schedule(name), driver, seed=4)
    seen = []
    for at in range(20):
        before = {key: value.detach().clone() for key, value in model.named_parameters()}
        step(model, driver, activity, at)
        on = {member.name for member in activity.on(at)}
        moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
        assert moved == on
        assert {key for key, value in model.named_parameters() if value in driver.state} == on
        assert {key for key, value in model.named_parameters() if value.requires_grad} == on
        if rule != "torch":
            assert driver.state_bytes() == activity.state_bytes(at, made)
        seen.append(on)
    assert len({frozenset(on) for on in seen}) > 3
    if name == "badam":
        assert len({activity.state_bytes(at, made) for at in range(20)}) == 1, "one block at a time, all alike"


def test_badam_forgets_everything_at_a_switch_even_for_a_single_block_and_lisa_keeps_what_stays_on() -> None:
    for name, ages in (("badam", [1, 2, 3, 1, 2, 3]), ("lisa", [1, 2, 3, 4, 5, 6])):
        model, driver, activity = bare(name=name, model=llama(1))
        found = []
        for at in range(6):
            step(model, driver, activity, at)
            (weight,) = [one.parameter for one in activity.members if one.name.endswith("0.mlp.up_proj.weight")]
            found.append(int(driver.state[weight]["t"]))
        assert found == ages


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("stop", [3, 4])
def test_resumed_is_uninterrupted_bit_for_bit(name: str, stop: int) -> None:
    whole, driver, activity = bare(name=name)
    for at in range(8):
        step(whole, driver, activity, at)
    broken, first, activity = bare(name=name)
    for at in range(stop):
        step(broken, first, activity, at)
    again = llama()
    again.load_state_dict(broken.state_dict())
    _, second, activity = bare(name=name, model=again)
    second.load_state_dict(first.state_dict())
    for at in range(stop, 8):
        step(again, second, activity, at)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("name", SCHEDULES)
def test_it_takes_turns_with_steps_in_backward(name: str) -> None:
    one, plain, activity = bare(name=name)
    other, inside, turns = bare(tt.InBackward("adamw"), name)
    for at in range(8):
        step(one, plain, activity, at)
        step(other, inside, turns, at)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_a_full_delta_trains_in_turns_like_the_weights_themselves() -> None:
    """The two representations give the same numbers: deltas of `full`, and the model's own parameters."""
    model, driver, activity = bare(name="badam")
    adapted = tt.attach(llama(), tt.Full(), where="all-linear, norm, embed, head")
    second = tt.Optimizer(adapted, "adamw", lr=0.01)
    turns = tt.Activity(adapted, schedule("badam"), second, seed=4)
    for at in range(7):
        step(model, driver, activity, at)
        step(adapted, second, turns, at)
    tt.merge(adapted)
    for (key, p), q in zip(model.named_parameters(), adapted.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=key)


def test_what_cannot_take_turns_is_refused() -> None:
    line = nn.Linear(2, 2)
    with pytest.raises(UserError, match="no blocks"):
        tt.Activity(line, tt.LISA(), torch.optim.SGD(line.parameters(), lr=1.0))
    model = tt.attach(llama(), tt.Full(), where="head")
    with pytest.raises(UserError, match="nothing that trains is inside a block"):
        tt.Activity(model, tt.LISA(), torch.optim.SGD(model.parameters(), lr=1.0))
    model = llama()
    late = torch.optim.SGD(model.model.layers[0].parameters(), lr=1.0)
    with pytest.raises(UserError, match="does not know"):
        tt.Activity(model, tt.LISA(), late)
    with pytest.raises(UserError, match="below 1"):
        tt.LISA(layers=0)
    with pytest.raises(UserError, match="one of random"):
        tt.BAdam(order="backwards")


def test_what_a_schedule_never_turns_on_is_told() -> None:
    model, _, activity = bare(name="badam")
    assert activity.never(30) == ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    _, _, activity = bare(name="gradual_unfreezing", model=model)
    assert activity.never(15) == ["model.embed_tokens.weight"]
    assert activity.never(16) == []


def gradient_depth(model: Any, activity: tt.Activity, at: int) -> int:
    """How many blocks a backward runs through."""
    activity.at(at)
    reached: list[int] = []
    hooks = []
    for index, block in enumerate(model.model.layers):

        def look(module: nn.Module, grads: Any, out: tuple[Tensor | None, ...], index: int = index) -> None:
            reached.append(index)

        hooks.append(block.register_full_backward_hook(look))
    model(input_ids=IDS, labels=IDS).loss.backward()
    for hook in hooks:
        hook.remove()
    return len(set(reached))


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_a_backward_ends_at_the_block_that_trains() -> None:
    model = llama()
    driver = tt.Optimizer(model, "sgd", lr=0.0)
    activity = tt.Activity(model, tt.BAdam(every=1, order="descending"), driver)
    assert [gradient_depth(model, activity, at) for at in range(3)] == [1, 2, 3]
