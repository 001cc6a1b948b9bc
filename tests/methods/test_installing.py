"""Installing on awkward modules: tied, patched, scripted, read raw, routed; and failures that change nothing."""

from __future__ import annotations

import copy
import errno
import os
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trimtab as tt
from trimtab import laws
from trimtab.laws.decoder import Decoder
from trimtab.laws.state import shape_of


def moved(model: Any, scale: float = 0.2) -> Any:
    """Trained tensors moved off their start."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))
    return model


def facts(model: nn.Module) -> tuple[Any, ...]:
    """Everything a refused verb must leave as it was."""
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return shape_of(model), {name: value.clone() for name, value in model.state_dict().items()}, flags


def unchanged(model: nn.Module, before: tuple[Any, ...]) -> None:
    modules, values, flags = facts(model)
    assert modules == before[0]
    assert flags == before[2]
    assert list(values) == list(before[1])
    assert all(torch.equal(values[name], before[1][name]) for name in values)


class Tied(nn.Module):
    """An embedding whose weight is the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(19, 12), nn.Linear(12, 12), nn.Linear(12, 19, bias=False)
        self.head.weight = self.embed.weight
        self.config = types.SimpleNamespace(tie_word_embeddings=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(x))))


@pytest.mark.parametrize("where", ["embed", "embed, body", "head, body"])
def test_merging_into_a_tied_weight_unties_it(where: str) -> None:
    torch.manual_seed(0)
    model = Tied().eval()
    ids = torch.randint(0, 19, (3, 5))
    moved(tt.attach(model, tt.LoRA(rank=3), where))
    before = model(ids)
    tt.merge(model)
    torch.testing.assert_close(model(ids), before)
    assert model.head.weight is not model.embed.weight
    assert model.config.tie_word_embeddings is False


def begins_within(method: Any) -> float:
    """How far the first output may be from the frozen one: Houlsby's U is drawn, not zero."""
    return 5e-4 if isinstance(method, tt.Houlsby) else 1e-4


@pytest.mark.parametrize(
    "method", [tt.LoRA(rank=3), tt.IA3(), tt.Houlsby(bottleneck=3)], ids=lambda one: type(one).__name__
)
def test_a_forward_patched_on_the_instance_is_respected_and_comes_back(method: Any) -> None:
    """accelerate replaces `forward` on instances, keeping the old one, to move inputs about."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    layer, x, calls = model[1], torch.randn(2, 3, 6), []
    inner = layer.forward

    def patched(x: Tensor) -> Tensor:
        calls.append("patched")
        return inner(x) * 2

    layer.forward = patched
    frozen = model(x).detach()
    tt.attach(model, method, "1")
    torch.testing.assert_close(model(x), frozen, rtol=1e-3, atol=begins_within(method))
    assert calls == ["patched"] * 2
    twin = copy.deepcopy(moved(model))
    assert not torch.allclose(twin(x), frozen)
    tt.detach(model)
    assert layer.__dict__["forward"] is patched
    assert torch.equal(model(x), frozen)


class Final(nn.Module):
    """A class that allows no subclass, so that none can be swapped in. Returns a pair, called by keyword."""

    def __init_subclass__(cls) -> None:
        raise TypeError("this class is final")

    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, str]:
        return hidden_states + self.down_proj(torch.relu(self.up_proj(hidden_states))), "kept"


class FinalChain(nn.Module):
    """Blocks of a final class."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Final(), Final()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, rest = layer(hidden_states=x)
            assert rest == "kept"
        return x


def test_a_module_whose_class_cannot_change_gets_a_hook() -> None:
    torch.manual_seed(0)
    model, x = FinalChain().eval(), torch.randn(2, 5, 24)
    before, frozen = facts(model), model(x).detach()
    moved(tt.attach(model, tt.Houlsby(bottleneck=3), "block"))
    y = model(x)
    assert type(model.layers[0]) is Final
    assert not torch.allclose(y, frozen)
    y.sum().backward()
    assert all(bool(one.grad.any()) for one in model.parameters() if one.requires_grad)
    with torch.no_grad():
        mixed = tt.activate(model, ["default", None])(x)
        torch.testing.assert_close(mixed, torch.stack([y[0], frozen[1]]))
    tt.detach(model)
    assert torch.equal(model(x), frozen)
    unchanged(model, before)


def test_a_linear_whose_class_cannot_change_gets_a_hook() -> None:
    torch.manual_seed(0)

    class FinalLinear(nn.Linear):
        def __init_subclass__(cls) -> None:
            raise TypeError("this class is final")

    model, x = nn.Sequential(FinalLinear(24, 20)), torch.randn(2, 5, 24)
    frozen = model(x).detach()
    moved(tt.attach(model, tt.LoRA(rank=3), "0"))
    y = model(x).detach()
    assert not torch.allclose(y, frozen)
    tt.merge(model)
    torch.testing.assert_close(model(x), y)
    assert type(model[0]) is FinalLinear


@pytest.mark.parametrize(
    "where", ["q_proj, nowhere", "q, model.layers.9.mlp", "all-linear, norm, q@7", "q_proj, model.embed_tokens"]
)
def test_attach_is_all_or_nothing(where: str) -> None:
    torch.manual_seed(0)
    model = Decoder()
    before = facts(model)
    with pytest.raises(tt.UserError) as told:
        tt.attach(model, [tt.LoRA(rank=2).at("v"), tt.IA3().at(where)])
    assert "IA3" in str(told.value)
    unchanged(model, before)
    assert "_trimtab" not in model.__dict__


def test_every_bad_term_is_named_at_once() -> None:
    with pytest.raises(tt.UserError) as told:
        tt.attach(Decoder(), tt.LoRA(), "q_prj, up, layers.7")
    assert "q_prj" in str(told.value)
    assert "layers.7" in str(told.value)
    assert "q_proj" in str(told.value)


def test_a_site_whose_init_refuses_changes_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(6, 8))
    before = facts(model)
    with pytest.raises(tt.UserError, match="group_size=4"):
        tt.attach(model, tt.QALoRA(rank=2, group_size=4), "0, 1")
    unchanged(model, before)


def test_loading_into_another_model_lists_all_that_does_not_fit(tmp_path: Path) -> None:
    tt.save(moved(tt.attach(Decoder(layers=3), tt.LoRA(rank=2), "q, up")), tmp_path)
    model = Decoder(layers=2, inner=36)
    before = facts(model)
    with pytest.raises(tt.UserError) as told:
        tt.load(model, tmp_path)
    for words in ("model.layers.2.self_attn.q_proj", "model.layers.2.mlp.up_proj", "(36, 24)", "(40, 24)"):
        assert words in str(told.value)
    unchanged(model, before)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_adapter(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = moved(tt.attach(Decoder(), tt.LoRA(rank=2)))
    tt.save(model, tmp_path / "old")
    old = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    moved(model)
    for folder in ("old", "new"):
        with pytest.raises(tt.UserError, match="No space left on device"):
            tt.save(model, tmp_path / folder)
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == old
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    tt.load(Decoder(), tmp_path / "old")


# ------------------------------------------------------------------------------------------- torch's own attention


@pytest.mark.parametrize(
    "method", [tt.LoRA(rank=3), tt.DoRA(rank=3), tt.OutputBias()], ids=lambda one: type(one).__name__
)
@pytest.mark.parametrize("where", ["q, v", "qkv, o", "q, k, v, o"])
def test_torch_attention_is_edited_in_every_mode(method: Any, where: str) -> None:
    """In eval without gradients torch takes a fused path that reads the weights; with them another one."""
    torch.manual_seed(0)
    model = laws.hosts.TorchAttention().eval()
    x = torch.randn(2, 7, 24)
    frozen = model(x).detach()
    moved(tt.attach(model, method, where))
    slow = model.train()(x).detach()
    model.eval()
    assert not torch.allclose(slow, frozen, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(model(x), slow)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), slow)
    tt.merge(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), slow)


@pytest.mark.parametrize("where", ["q, v", "up, down", "all-linear", "norm", "ffn"])
def test_the_encoder_of_torch_is_edited_in_every_mode(where: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 4, 40, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(3, 7, 24)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[0, 5:] = True
    real = ~padding
    with torch.no_grad():
        frozen = model(x, src_key_padding_mask=padding)
    method = {"norm": tt.LNTuning(), "ffn": tt.Houlsby(bottleneck=3)}.get(where, tt.LoRA(rank=3))
    moved(tt.attach(model, method, where))
    slow = model.train()(x, src_key_padding_mask=padding).detach()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[real], slow[real])
        assert not torch.allclose(slow[real], frozen[real], atol=1e-3)
        tt.detach(model)
        assert torch.equal(model(x, src_key_padding_mask=padding), frozen)


# ------------------------------------------------------------------------------------------------ routed experts


def mixture(kind: str) -> Any:
    import transformers as hf

    sizes = {"vocab_size": 31, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_experts_per_tok": 2, "initializer_range": 0.2}
    if kind == "mixtral":
        config = hf.MixtralConfig(**sizes, num_local_experts=4, intermediate_size=20)
        return hf.MixtralForCausalLM(config).eval()
    if kind == "qwen3_moe":
        extra = {"num_experts": 4, "moe_intermediate_size": 20, "intermediate_size": 40, "head_dim": 6}
        return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**sizes, **extra)).eval()
    extra = {"num_local_experts": 4, "intermediate_size": 20, "head_dim": 6}
    model = hf.GptOssForCausalLM(hf.GptOssConfig(**sizes, **extra)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_bias"):
                parameter.normal_(std=0.2)
    return model


EXPERT_METHODS = [tt.LoRA(rank=3), tt.DoRA(rank=3), tt.IA3(), tt.Full()]


@pytest.mark.parametrize("method", EXPERT_METHODS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts(kind: str, method: Any, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = mixture(kind)
    ids = torch.randint(0, 31, (3, 9))
    frozen = model(ids).logits.detach()
    where = "expert_gate_up, expert_down" if kind == "gpt_oss" else "expert_gate, expert_up, expert_down"
    tt.attach(model, method, where)
    torch.testing.assert_close(model(ids).logits, frozen, rtol=1e-4, atol=1e-5)
    moved(model, 0.05)
    y = model(ids).logits
    assert not torch.allclose(y, frozen, atol=1e-3)
    y.square().mean().backward()
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    assert trained
    for name, one in trained.items():
        assert one.grad is not None, name
        assert one.shape[0] == 4, name
        if isinstance(method, tt.LoRA):
            sizes = {"A": (3, 20 if "down" in name else 24), "B": (24 if "down" in name else 40, 3)}
            halved = {"A": sizes["A"], "B": (20, 3)} if ":" in name else sizes
            assert one.shape[1:] == halved[name[-1]], name
        assert bool(one.grad.any()), name
    tt.save(model, tmp_path)
    torch.manual_seed(0)
    again = tt.load(mixture(kind), tmp_path)
    assert torch.equal(again(ids).logits, y)
    tt.merge(model)
    torch.testing.assert_close(model(ids).logits, y, rtol=1e-4, atol=1e-5)


def test_each_expert_is_edited_by_its_own_pair() -> None:
    torch.manual_seed(0)
    model = laws.hosts.Chain(laws.hosts.ExpertBlock())
    experts = model.layers[0].experts
    W = experts.down_proj.detach().clone()
    moved(tt.attach(model, tt.LoRA(rank=3, alpha=6.0), "expert_down"))
    delta = next(iter(experts.delta.values()))
    assert delta.A.shape == (3, 3, 16)
    assert not torch.equal(delta.A[0], delta.A[1])
    for expert in range(3):
        wanted = W[expert] + 2.0 * delta.B[expert] @ delta.A[expert]
        torch.testing.assert_close(experts.down_proj[expert], wanted)


def test_methods_that_cannot_edit_stacked_experts_say_so() -> None:
    model = laws.hosts.Chain(laws.hosts.ExpertBlock())
    before = facts(model)
    with pytest.raises(tt.UserError, match="has no bias"):
        tt.attach(model, tt.OutputBias(), "expert_down")
    with pytest.raises(tt.UserError, match="stack of matrices"):
        tt.attach(model, tt.FishMask(), "expert_down", statistics={})
    with pytest.raises(tt.UserError, match="raw"):
        tt.attach(model, tt.Houlsby(), "expert_down")
    unchanged(model, before)


def test_biased_experts_are_scaled_with_their_biases() -> None:
    torch.manual_seed(0)
    model = laws.hosts.Chain(laws.hosts.ExpertBlock())
    experts = model.layers[0].experts
    W, b = experts.gate_up_proj.detach().clone(), experts.gate_up_proj_bias.detach().clone()
    moved(tt.attach(model, tt.IA3(), "expert_up"))
    rows = slice(16, 32)
    x = torch.randn(5, 24)
    delta = next(iter(experts.delta.values()))
    found = torch.einsum("ti,eoi->eto", x, experts.gate_up_proj) + experts.gate_up_proj_bias[:, None]
    wanted = torch.einsum("ti,eoi->eto", x, W) + b[:, None]
    wanted[..., rows] = wanted[..., rows] * delta.l[:, None]
    torch.testing.assert_close(found, wanted)
    assert F.mse_loss(found, wanted) < 1e-8


@pytest.mark.parametrize("method", [tt.LoRA(rank=3), tt.Houlsby(bottleneck=3)], ids=lambda one: type(one).__name__)
def test_hooks_of_accelerate_stay_in_place(method: Any) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    torch.manual_seed(0)

    class Doubling(hooks.ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return 2 * output

    model, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), torch.randn(2, 3, 6)
    plain = model(x).detach()
    hooks.add_hook_to_module(model[1], Doubling())
    frozen = model(x).detach()
    torch.testing.assert_close(frozen, 2 * plain)
    tt.attach(model, method, "1")
    torch.testing.assert_close(model(x), frozen, rtol=1e-3, atol=begins_within(method))
    moved(model)
    assert not torch.allclose(model(x), frozen, atol=1e-3)
    tt.detach(model)
    assert torch.equal(model(x), frozen)
    hooks.remove_hook_from_module(model[1])
    assert torch.equal(model(x), plain)


def test_parts_that_want_different_things_measured_at_one_site_are_refused() -> None:
    """What is measured goes by the name of its site: the second would take the first one's place."""
    model = laws.hosts.Alone(nn.Linear(24, 20))
    both = [tt.LoRA(rank=2, start="corda").at("layer"), tt.FishMask().at("layer")]
    with pytest.raises(tt.UserError, match="at layer one part wants its covariance, another its fisher"):
        tt.attach(model, both, statistics={"layer": torch.eye(24)})
    texts = [tt.PrefixTuning(hidden=None, start="text", tokens=tokens).at("k") for tokens in ((3, 4), (5, 6))]
    with pytest.raises(tt.UserError, match="its activations, another those of another text"):
        tt.attach(next(one for one in laws.zoo() if one.name == "decoder").build(), texts)
    same = [tt.LoRA(rank=2, start="corda").at("layer"), tt.LoRA(rank=3, start="corda").at("layer")]
    tt.attach(model, same, statistics={"layer": torch.eye(24)})
