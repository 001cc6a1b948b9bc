"""Every optimization of the training step changes nothing but its speed and its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import trimtab as tt
from trimtab.core import frozen, product
from trimtab.core.delta import Delta
from trimtab.engine import loss as losses
from trimtab.engine.faster import PIECES, faster
from trimtab.engine.kernels import GATES, gated, rms_norm
from trimtab.engine.rotary import behaves, quick_rotary, turning

WORDS = 53
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def decoder(name: str) -> nn.Module:
    torch.manual_seed(0)
    made: Any = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.2)),
        "qwen": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, initializer_range=0.2)),
        "gemma": lambda: Gemma2ForCausalLM(
            Gemma2Config(**SIZES, initializer_range=0.2, attn_logit_softcapping=None, final_logit_softcapping=None)
        ),
    }[name]
    model = made().eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5, 0.2)
    return model


def batch() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, WORDS, (3, 11), generator=draw)
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def loss_and_gradients(model: nn.Module) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss, _ = losses.loss_sum(model, batch(), "causal")
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trained(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model


def inside_a_line(value: Tensor) -> Tensor:
    """A copy that does not begin at a cache line, like the weights of most mapped files."""
    room = torch.empty(value.numel() + 16, dtype=value.dtype)
    start = (8 - room.data_ptr()) % 64 // value.element_size()
    return room[start : start + value.numel()].view(value.shape).copy_(value)


def agree(ours: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    assert plain
    assert ours.keys() == plain.keys()
    for name, expected in plain.items():
        assert (ours[name] - expected).abs().max() <= 1e-5 * expected.abs().max(), name


@pytest.mark.parametrize("name", ["llama", "qwen", "gemma"])
@pytest.mark.parametrize("piece", [one for one in PIECES if one != "varlen"])
def test_a_piece_changes_neither_loss_nor_gradients(name: str, piece: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "LARGE", 0)
    monkeypatch.setattr("trimtab.engine.faster.LARGE", 0)
    monkeypatch.setattr("trimtab.core.mapped.SMALL", 0)
    model = trained(tt.attach(decoder(name), tt.LoRA(rank=4), "q, v, gate"))
    for parameter in model.parameters():
        parameter.data = inside_a_line(parameter.data)
    plain_loss, plain = loss_and_gradients(model)
    classes = [type(module) for module in model.modules()]
    with faster(model, (piece,)) as replaced:
        assert replaced
        loss, ours = loss_and_gradients(model)
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    agree(ours, plain)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("name", ["llama", "qwen", "gemma"])
def test_chunked_loss_and_low_rank_products_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(tt.attach(decoder(name), tt.LoRA(rank=4)))
    monkeypatch.setattr(losses, "CHUNK", 5)
    loss, ours = loss_and_gradients(model)
    assert losses.ends_with_head(model)
    monkeypatch.setattr(frozen, "frozen_weight", lambda base, x: None)
    monkeypatch.setattr(losses, "ends_with_head", lambda model: False)
    plain_loss, plain = loss_and_gradients(model)
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    agree(ours, plain)


def test_a_trained_output_matrix_gets_its_gradient_from_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tt.attach(decoder("llama"), tt.Full(), where="head, embed, q")
    monkeypatch.setattr(losses, "CHUNK", 4)
    _, ours = loss_and_gradients(model)
    monkeypatch.setattr(losses, "ends_with_head", lambda model: False)
    _, plain = loss_and_gradients(model)
    agree(ours, plain)


def test_capped_logits_are_not_taken_for_plain_ones() -> None:
    config = Gemma2Config(**SIZES, final_logit_softcapping=3.0, initializer_range=0.5)
    assert not losses.ends_with_head(Gemma2ForCausalLM(config).eval())


def test_what_is_trained_or_edited_stays_as_it_is() -> None:
    model = tt.attach(decoder("llama"), tt.LNTuning())
    with faster(model, ("norms",)) as replaced:
        assert replaced == []
    model = tt.attach(decoder("llama"), tt.Houlsby(bottleneck=4), where="ffn")
    with faster(model, ("gates",)) as replaced:
        assert replaced == []


def test_layers_that_only_look_alike_are_left_alone() -> None:
    class Odd(nn.Module):
        """A norm by its parts, but of the absolute value."""

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8), requires_grad=False), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x / x.abs().mean(-1, keepdim=True)

    with faster(nn.Sequential(Odd())) as replaced:
        assert replaced == []


@pytest.mark.parametrize(("rank", "bias"), [(1, False), (8, True), (16, False), (20, True)])
def test_low_rank_product_is_the_plain_expression(rank: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = tt.attach(nn.Sequential(nn.Linear(12, 20, bias=bias)), tt.LoRA(rank=rank), where="0")
    delta = next(module for module in layer.modules() if isinstance(module, Delta))
    nn.init.normal_(delta.B)
    x, dy = torch.randn(2, 5, 12, requires_grad=True), torch.randn(2, 5, 20)
    W, b = layer[0]._parameters["weight"], layer[0]._parameters.get("bias")
    got = torch.autograd.grad(layer(x), (x, delta.A, delta.B), dy)
    y = F.linear(x, W, b) + delta.method.scale * (x @ delta.A.mT @ delta.B.mT)
    for ours, plain in zip(got, torch.autograd.grad(y, (x, delta.A, delta.B), dy), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_low_rank_product_keeps_a_marked_input_by_its_ingredients() -> None:
    layer = tt.attach(nn.Sequential(nn.Linear(6, 4)), tt.LoRA(rank=2), where="0")
    x = torch.randn(3, 6, requires_grad=True)
    normed = rms_norm(x, torch.ones(6), 1e-6)
    held: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.data_ptr()) or t, lambda t: t):
        layer(normed)
    assert normed.data_ptr() not in held
    assert x.data_ptr() in held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_the_plain_expression(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(3, 7, 16, dtype=dtype, requires_grad=True), torch.rand(16).to(dtype)
    dy = torch.randn(3, 7, 16, dtype=dtype)
    wide = x.float()
    plain = w * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(dtype)
    ours = rms_norm(x, w, 1e-5)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(ours, plain, **tolerance)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, dy)[0] for y in (ours, plain)), **tolerance)


def turned_plainly(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """x cos + (−x₂, x₁) sin, of queries and keys."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    other = [torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1) for x in (q, k)]
    return q * cos + other[0] * sin, k * cos + other[1] * sin


@pytest.mark.parametrize("axis", [1, 2])
def test_rotary_positions_are_the_plain_expression_even_where_the_halves_differ(axis: int) -> None:
    torch.manual_seed(0)
    shape = [(2, 5, heads, 8) if axis == 2 else (2, heads, 5, 8) for heads in (4, 2)]
    q, k = (torch.randn(one, dtype=torch.float64, requires_grad=True) for one in shape)
    cos, sin = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    dys = [torch.randn(one, dtype=torch.float64) for one in shape]
    found = []
    for function in (quick_rotary(pytest.fail), turned_plainly):  # type: ignore[arg-type]
        ys = function(q, k, cos, sin, unsqueeze_dim=axis)
        found.append([*ys, *torch.autograd.grad(ys, (q, k), dys)])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_rotary_positions_of_another_kind_are_left_alone_and_every_function_comes_back() -> None:
    from transformers.models.llama import modeling_llama

    def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        other = [torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) for x in (q, k)]
        return q * cos + other[0] * sin, k * cos + other[1] * sin

    assert behaves(turned_plainly)
    assert not behaves(interleaved)
    own = modeling_llama.apply_rotary_pos_emb
    with turning(decoder("llama")) as names:
        assert names == [modeling_llama.__name__]
        assert modeling_llama.apply_rotary_pos_emb is not own
    assert modeling_llama.apply_rotary_pos_emb is own
    narrow = torch.ones(1, 3, 4), torch.ones(1, 3, 4)  # part of the width only: the module's own business
    calls: list[int] = []
    quick_rotary(lambda *given, **named: calls.append(1) or given[:2])(
        torch.ones(1, 2, 3, 8), torch.ones(1, 1, 3, 8), *narrow
    )
    assert calls == [1]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(3, 8), (20, 256)])
def test_a_product_with_an_addend_is_the_plain_expression(rows: int, width: int, bias: bool) -> None:
    torch.manual_seed(0)
    x, W, plus = torch.randn(rows, width), torch.randn(width + 8, width), torch.randn(rows, width + 8)
    b = torch.randn(width + 8) if bias else None
    expected = x.double() @ W.double().mT + plus.double() + (0 if b is None else b.double())
    got = product.product(x, W, b, plus)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("gate", list(GATES))
def test_gated_product_is_the_plain_expression(gate: str) -> None:
    torch.manual_seed(0)
    g, u, dm = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)
    ours, plain = gated(g, u, gate), GATES[gate][0](g) * u
    torch.testing.assert_close(ours, plain)
    for one, other in zip(torch.autograd.grad(ours, (g, u), dm), torch.autograd.grad(plain, (g, u), dm), strict=True):
        torch.testing.assert_close(one, other)


def test_siblings_are_seen_in_a_trial_and_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.engine import siblings

    model = trained(tt.attach(decoder("llama"), tt.LoRA(rank=2), "q, v, gate, up"))
    loss_and_gradients(model)  # the first time, a trial of the output matrix runs too
    calls: list[int] = []
    original = siblings.low_rank_products
    monkeypatch.setattr(siblings, "low_rank_products", lambda x, p: calls.append(len(p)) or original(x, p))
    with siblings.together(model) as groups:
        assert [[path.rpartition(".")[2] for path in group] for group in groups] == [
            ["q_proj", "k_proj", "v_proj"],
            ["gate_proj", "up_proj"],
        ] * 2
        loss_and_gradients(model)
    assert calls == [3, 2, 3, 2]
    assert not any("_trimtab_siblings" in module.__dict__ for module in model.modules())


def test_a_sibling_called_with_another_input_computes_for_itself() -> None:
    from trimtab.engine.siblings import together

    model: Any = trained(tt.attach(decoder("llama"), tt.LoRA(rank=2), "q, k, v"))
    attention = model.model.layers[0].self_attn
    x, other = torch.randn(1, 5, 32), torch.randn(1, 5, 32)
    plain = attention.k_proj(other), attention.v_proj(x)
    with together(model):
        attention.q_proj(x)
        assert torch.allclose(attention.k_proj(other), plain[0], atol=1e-6)
        assert torch.allclose(attention.v_proj(x), plain[1], atol=1e-6)
        attention.q_proj(x)
        x.add_(1)
        assert torch.allclose(attention.v_proj(x), plain[1] + attention.v_proj(torch.ones_like(x)), atol=1e-4)


def test_an_adapter_that_is_off_is_not_computed_by_siblings() -> None:
    from trimtab.engine.siblings import together

    model: Any = trained(tt.attach(decoder("llama"), tt.LoRA(rank=2), "q, k, v"))
    x = torch.randn(1, 5, 32)
    tt.activate(model, None)
    attention = model.model.layers[0].self_attn
    with together(model):
        assert torch.allclose(attention.q_proj(x), F.linear(x, attention.q_proj.weight), atol=1e-6)


def test_what_is_computed_in_inference_mode_stands_in_nobodys_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "LARGE", 0)
    layer = tt.attach(nn.Sequential(nn.Linear(24, 20)), tt.LoRA(rank=4), where="0")
    x = torch.randn(32, 24)
    with torch.inference_mode():
        expected = layer(x).clone()
    y = layer(x.requires_grad_())
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected)
