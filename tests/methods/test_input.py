"""Starts of prompts, what baking leaves, going on with training, and the search for tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.methods.test_positions import adapted, gpt2, llama
from torch import Tensor

import trimtab as tt
from trimtab.core import attention
from trimtab.methods.hidden import llama_adapter


def prompt(model: Any) -> Tensor:
    return model.get_input_embeddings().delta["default"].P.detach()


def test_a_prompt_starts_as_different_tokens_a_text_or_noise() -> None:
    model = llama()
    table = model.get_input_embeddings().weight.detach().clone()
    tt.attach(model, tt.PromptTuning(length=6, among=9))
    ids = [int((table == row).all(1).nonzero()) for row in prompt(model)]
    assert len(set(ids)) == 6
    assert max(ids) < 9
    tt.attach(tt.detach(model), tt.PromptTuning(length=4, start="text", tokens=(7, 30)))
    torch.testing.assert_close(prompt(model)[:2], table[[7, 30]], rtol=0, atol=0)
    assert all(any(torch.equal(row, one) for one in table) for row in prompt(model)[2:])
    tt.attach(tt.detach(model), tt.PromptTuning(length=1, start="text", tokens=(7, 30)))
    torch.testing.assert_close(prompt(model), table[[7]], rtol=0, atol=0)
    tt.attach(tt.detach(model), tt.PromptTuning(length=40, start="random"))
    assert prompt(model).min() < -0.45
    assert 0.45 < prompt(model).max() <= 0.5


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"start": "words"}, "one of random"),
        ({"length": 0}, "from 1 on"),
        ({"length": 9, "among": 8}, "among at least"),
        ({"text": "say"}, "start='text'"),
        ({"start": "text"}, "needs one of them"),
    ],
)
def test_wrong_settings_are_told(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(tt.UserError) as error:
        tt.PromptTuning(**settings)
    assert words in str(error.value)


@pytest.mark.parametrize("method", [tt.PTuning, tt.PTuningLSTM, tt.PrefixTuning])
def test_sizes_are_checked(method: Any) -> None:
    for settings in ({"length": 0}, {"hidden": 0}):
        with pytest.raises(tt.UserError, match="from 1 on"):
            method(**settings)


def test_a_text_needs_its_ids_and_ids_have_to_exist() -> None:
    with pytest.raises(tt.UserError, match="tokens=tokenizer"):
        tt.attach(llama(), tt.PromptTuning(length=2, start="text", text="say"))
    with pytest.raises(tt.UserError, match="31 tokens"):
        tt.attach(llama(), tt.PromptTuning(length=2, start="text", tokens=(31,)))


BAKED = {
    "prefix": (tt.PrefixTuning(length=3, hidden=8), tt.PrefixTuning(length=3, hidden=None)),
    "mlp": (tt.PTuning(length=3), tt.PromptTuning(length=3, start="random")),
    "lstm": (tt.PTuningLSTM(length=3), tt.PromptTuning(length=3, start="random")),
}


@pytest.mark.parametrize("name", BAKED)
def test_baked_files_hold_the_virtual_tokens_only_and_generate_the_same(name: str, tmp_path: Path) -> None:
    method, left = BAKED[name]
    model = adapted(llama, method)
    ids = torch.randint(3, 31, (2, 5))
    wanted = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    tt.save(model, tmp_path, bake=True)
    torch.manual_seed(5)
    again = tt.load(llama(), tmp_path)
    assert torch.equal(again.generate(input_ids=ids, max_new_tokens=5, do_sample=False), wanted)
    state = again.__dict__["_trimtab"].adapters["default"]
    assert [part.method for part in state.parts] == [left]
    trained = sum(one.numel() for one in again.parameters() if one.requires_grad)
    assert trained == 3 * sum(module.delta["default"].P.shape[1] for module in sites(again))
    again(input_ids=ids, labels=ids).loss.backward()
    assert all(bool(module.delta["default"].P.grad.any()) for module in sites(again))


def sites(model: Any) -> list[Any]:
    return [module for module in model.modules() if "delta" in module._modules]


@pytest.mark.parametrize("name", BAKED)
def test_a_file_with_the_network_goes_on_exactly(name: str, tmp_path: Path) -> None:
    ids = torch.randint(3, 31, (2, 5))

    def steps(model: Any, count: int) -> Any:
        trained = [one for one in model.parameters() if one.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.05)
        for _ in range(count):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    model = steps(adapted(llama, BAKED[name][0]), 2)
    tt.save(model, tmp_path)
    torch.manual_seed(5)
    again = steps(tt.load(llama(), tmp_path), 2)
    steps(model, 2)
    for one, other in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_baking_leaves_other_parts_alone(tmp_path: Path) -> None:
    model = llama()
    tt.attach(model, [tt.LoRA(rank=2).at("q"), tt.PTuning(length=2), tt.PromptTuning(length=3, start="random")])
    ids = torch.randint(3, 31, (2, 5))
    wanted = model(input_ids=ids).logits
    tt.save(model, tmp_path, bake=True)
    tt.load(tt.detach(model), tmp_path)
    torch.testing.assert_close(model(input_ids=ids).logits, wanted)


# ------------------------------------------------------------------------------------------------------ the search


def planted(make: Any, length: int = 2) -> tuple[Any, Tensor, Any]:
    """A model, rows, and a loss that is least where the prompt is one certain pair of tokens."""
    torch.manual_seed(2)
    model = make()
    rows = torch.randint(3, 31, (4, 6))
    best = torch.tensor([[11, 23][:length]])
    with torch.no_grad():
        goal = model(input_ids=torch.cat([best.expand(4, -1), rows], 1)).logits[:, length:].log_softmax(-1)

    def loss(one: Any, batch: Tensor) -> Tensor:
        found = one(input_ids=batch).logits.log_softmax(-1)
        return (goal.exp() * (goal - found)).sum(-1).mean()

    return model, rows, loss


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_search_finds_a_planted_prompt_and_its_loss_never_rises(make: Any, tmp_path: Path) -> None:
    model, rows, loss = planted(make)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tt.attach(model, tt.AutoPrompt(length=2, candidates=15))
    found = tt.search_prompt(model, [rows], loss, steps=24, seed=1)
    assert all(one.after <= one.before for one in found)
    assert all(one.before == other.after for one, other in zip(found[1:], found, strict=False))
    assert found[-1].after < 1e-5 < found[0].before
    assert found[-1].tokens == (11, 23)
    with torch.no_grad():
        wanted = model(input_ids=rows).logits
        tt.save(model, tmp_path)
        tt.detach(model)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        text = torch.cat([torch.tensor([[11, 23]]).expand(4, -1), rows], 1)
        torch.testing.assert_close(model(input_ids=text).logits[:, 2:], wanted)
        tt.load(model, tmp_path)
        assert torch.equal(model(input_ids=rows).logits, wanted)
        assert model.get_input_embeddings().delta["default"].t.tolist() == [11, 23]


def test_candidates_are_those_of_the_exact_gradient_and_banned_ids_are_left_out() -> None:
    model, rows, loss = planted(llama)
    method = tt.AutoPrompt(length=2, candidates=4, tokens=(5, 9))
    tt.attach(model, method)
    p = model.get_input_embeddings().delta["default"]
    loss(model, rows).backward()
    W = model.get_input_embeddings().weight.detach()
    soft = p.E.clone().requires_grad_()
    text = torch.cat([soft.expand(4, -1, -1), W[rows]], 1)
    with torch.no_grad():
        tt.detach(model)
    plain = model(inputs_embeds=text).logits[:, 2:]

    class Fixed:
        def __call__(self, input_ids: Tensor) -> Any:
            return type("Out", (), {"logits": plain})

    loss(Fixed(), rows).backward()
    torch.testing.assert_close(p.o.grad, soft.grad)
    order = sorted((t for t in range(31) if t not in (9, 3)), key=lambda t: float(soft.grad[1] @ W[t]))
    assert method.best(p, W.mT, 1, torch.tensor([3])).tolist() == order[:4]


def test_a_search_wants_batches_and_an_auto_prompt() -> None:
    model, rows, loss = planted(llama)
    tt.attach(model, tt.LoRA(rank=2))
    with pytest.raises(tt.UserError, match="no AutoPrompt"):
        tt.search_prompt(model, [rows], loss, steps=1)
    with pytest.raises(tt.UserError, match="no batches"):
        tt.search_prompt(model, [], loss)


def test_prompt_keys_come_from_the_frozen_projections(monkeypatch: pytest.MonkeyPatch) -> None:
    """A LoRA or a prefix at k and v edits what tokens make, not what LLaMA-Adapter's prompt makes."""
    made: list[Tensor] = []

    def spy(*given: Any) -> Any:
        found = attention.at_prompt(*given)
        made.append(torch.stack(found[:2]))
        return found

    monkeypatch.setattr(llama_adapter, "at_prompt", spy)
    ids = torch.randint(3, 31, (2, 5))
    model = adapted(llama, tt.LLaMAAdapter(length=3))
    alone = model(input_ids=ids).logits
    tt.attach(model, [tt.LoRA(rank=2).at("k, v"), tt.PrefixTuning(length=2, hidden=None)], name="other")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other" in name:
                parameter.add_(0.3)
    both = model(input_ids=ids).logits
    assert len(made) == 4
    assert torch.equal(made[0], made[2])
    assert not torch.allclose(alone, both)


def test_activations_are_those_of_the_first_real_tokens() -> None:
    """Row after row, without padding, until there are enough; slices have their own rows of a fused projection."""
    model = gpt2()
    ids = torch.arange(2, 14).view(2, 6)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    width = model.config.n_embd
    found = tt.activations(model, [{"input_ids": ids, "attention_mask": mask}], "k, v")
    layer = model.transformer.h[0]
    with torch.no_grad():
        x = layer.ln_1(model.transformer.wte(ids) + model.transformer.wpe(torch.arange(6)))
        k = layer.attn.c_attn(x)[..., width : 2 * width]
    wanted = torch.cat([k[0, :4], k[1]])
    torch.testing.assert_close(found["transformer.h.0.attn.c_attn:k"], wanted)


def test_a_prefix_longer_than_what_was_measured_begins_again() -> None:
    model = gpt2()
    method = tt.PrefixTuning(length=5, hidden=None, start="rows")
    measured = tt.activations(model, [{"input_ids": torch.tensor([[3, 4]])}], method.where)
    tt.attach(model, method, statistics=measured)
    for P in (parameter for parameter in model.parameters() if parameter.requires_grad):
        assert torch.equal(P[[0, 1, 0]], P[[2, 3, 4]])
        assert not torch.equal(P[0], P[1])
    found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(torch.equal(P[:2], start) for P, start in zip(found, measured.values(), strict=True))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: tt.PrefixTuning(start="rows"), "trained directly"),
        (lambda: tt.PrefixTuning(hidden=None, start="words"), "start='words'"),
        (lambda: tt.PreLayer(text="hello"), "belong to start='text'"),
        (lambda: tt.PreLayer(start="text"), "needs one of them"),
        (lambda: tt.attach(gpt2(), tt.PreLayer(start="rows")), "no activations was measured"),
        (lambda: tt.activations(gpt2(), [], "k"), "nothing came out"),
    ],
)
def test_starts_that_do_not_go_together_are_said(make: Any, says: str) -> None:
    with pytest.raises(tt.UserError, match=says):
        make()
