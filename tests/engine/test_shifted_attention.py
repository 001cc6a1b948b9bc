"""Shifted sparse attention: its equation, no look ahead, whole where one group covers the row, whole in evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import trimtab as tt
from trimtab.data.batches import collate
from trimtab.data.encoded import Encoded
from trimtab.data.packing import Segment, pack
from trimtab.engine.faster import running
from trimtab.engine.loss import loss_sum
from trimtab.engine.shifted_attention import can_shift, cuts, group_for, shifted_attention, shifted_in

WORDS = 61


def llama(heads: int = 4, key_heads: int = 2) -> Any:
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=8 * heads,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config)


class Training(nn.Module):
    """Stands for the attention module that transformers passes on."""


def oracle(q: np.ndarray, k: np.ndarray, v: np.ndarray, group: int, scale: float) -> np.ndarray:
    """One row, (heads, tokens, width): query t of a plain head meets the keys s <= t with s // G = t // G; in the other
    half of the heads with (s + G/2) // G = (t + G/2) // G. A row of one group is whole."""
    heads, tokens, width = q.shape
    y = np.zeros((tokens, heads, width))
    for head in range(heads):
        mine = head // (heads // k.shape[0])
        late = group // 2 if head >= heads // 2 else 0
        for t in range(tokens):
            seen = [s for s in range(t + 1) if tokens <= group or (s + late) // group == (t + late) // group]
            scores = np.array([q[head, t] @ k[mine, s] for s in seen]) * scale
            share = np.exp(scores - scores.max())
            y[t, head] = share / share.sum() @ v[mine, seen]
    return y


def draw(heads: int, key_heads: int, tokens: int, rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return tuple(torch.randn(rows, n, tokens, 6, dtype=torch.float64) for n in (heads, key_heads, key_heads))


@pytest.mark.parametrize("tokens", [3, 8, 9, 11, 12, 13, 16, 24, 25, 31])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (4, 1), (9, 3), (1, 1)])
def test_it_equals_its_equation(heads: int, key_heads: int, tokens: int) -> None:
    q, k, v = draw(heads, key_heads, tokens)
    y, _ = shifted_attention(Training().train(), q, k, v, None, scaling=0.3, group=8)
    assert y.shape == (2, tokens, heads, 6)
    for row in range(2):
        wanted = oracle(q[row].numpy(), k[row].numpy(), v[row].numpy(), 8, 0.3)
        np.testing.assert_allclose(y[row].numpy(), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [16, 21])
def test_no_output_depends_on_what_follows(tokens: int) -> None:
    """Exactly: the wrap-around of the official eager code would show in the first tokens."""
    q, k, v = (one.requires_grad_() for one in draw(4, 2, tokens, rows=1))
    y, _ = shifted_attention(Training().train(), q, k, v, None, group=8)
    for t in range(tokens):
        gradients = torch.autograd.grad(y[0, t].sum(), (q, k, v), retain_graph=True)
        for gradient in gradients:
            assert not gradient[:, :, t + 1 :].any()
        assert gradients[2][:, :, t].any()  # where a token sees itself alone, q and k change nothing


def test_no_logit_depends_on_tokens_that_follow() -> None:
    torch.manual_seed(0)
    model = llama().train()
    x = model.model.embed_tokens(torch.randint(0, WORDS, (1, 21))).detach().requires_grad_()
    with shifted_in(model, 8):
        logits = model(inputs_embeds=x, use_cache=False).logits
    for t in range(21):
        (gradient,) = torch.autograd.grad(logits[0, t].square().sum(), x, retain_graph=True)
        assert not gradient[:, t + 1 :].any()
        assert gradient[:, : max(1, t - 3)].any(), "groups pass nothing on"


@pytest.mark.parametrize("group", [24, 26, 64])
def test_it_is_whole_where_one_group_covers_the_row(group: int) -> None:
    torch.manual_seed(0)
    model = llama().train()
    ids = torch.randint(0, WORDS, (2, 24))
    whole = model(ids).logits
    with shifted_in(model, group):
        torch.testing.assert_close(model(ids).logits, whole)
    with shifted_in(model, 8):
        assert not torch.allclose(model(ids).logits, whole, atol=1e-3)


def test_evaluation_and_what_follows_are_whole() -> None:
    torch.manual_seed(0)
    model = llama().eval()
    ids = torch.randint(0, WORDS, (2, 24))
    whole, before = model(ids).logits, model.config._attn_implementation
    with shifted_in(model, 8):
        torch.testing.assert_close(model(ids).logits, whole)
    assert model.config._attn_implementation == before
    torch.testing.assert_close(model.train()(ids).logits, whole)


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (3, 1)])
def test_packed_rows_have_the_gradients_of_rows_alone(heads: int, key_heads: int) -> None:
    torch.manual_seed(0)
    model = llama(heads, key_heads).train()
    tt.attach(model, tt.LoRA(rank=2))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.1 * torch.randn_like(parameter))
    rows = [Encoded(torch.randint(1, WORDS, (n,)).tolist(), [True] * n) for n in (5, 8, 13, 21, 30)]

    def gradients(batches: list[Any]) -> tuple[Tensor, ...]:
        with running(model, packed=True, group=8):
            return torch.autograd.grad(sum(loss_sum(model, one, "causal")[0] for one in batches), trained)

    alone = gradients([collate([row], 0) for row in rows])
    for together in ([pack(rows, None)], [pack(rows[:2], None), pack(rows[2:], None)]):
        for one, other in zip(gradients(together), alone, strict=True):
            assert float((one - other).abs().max()) <= 1e-5 * float(other.abs().max())
    checkpointed = []
    with running(model, packed=True, group=8, policy="block"):
        loss_sum(model, pack(rows, None), "causal")[0].backward()
        checkpointed = [parameter.grad for parameter in trained]
    for one, other in zip(checkpointed, alone, strict=True):
        assert float((one - other).abs().max()) <= 1e-5 * float(other.abs().max())


def test_a_packed_row_that_others_continue_is_refused() -> None:
    q, k, v = draw(2, 2, 12, rows=1)
    segments = (Segment(0, 8), Segment(8, 12, (0,)))
    with pytest.raises(tt.UserError, match="groups are those of one causal row"):
        shifted_attention(Training().train(), q, k, v, None, segments=segments, group=4)


def test_pieces_cover_a_row_in_order() -> None:
    assert cuts(10, 18, 8, 4) == [(10, 18, 1)]
    assert cuts(10, 34, 8, 0) == [(10, 34, 3)]
    assert cuts(10, 34, 8, 4) == [(10, 14, 1), (14, 30, 2), (30, 34, 1)]
    assert cuts(0, 11, 8, 4) == [(0, 4, 1), (4, 11, 1)]
    assert [group_for(longest) for longest in (1, 8, 9, 64, 1000)] == [2, 2, 4, 16, 250]


def test_what_cannot_be_shifted() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    assert can_shift(llama(), 64)
    assert can_shift(GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=1, n_head=4)), 64)
    sizes = {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 1, "num_heads": 4}
    assert not can_shift(T5ForConditionalGeneration(T5Config(vocab_size=WORDS, **sizes)), 64)
    model = llama()
    model.config.sliding_window = 32
    assert not can_shift(model, 64)
    for group in (7, 0, -2):
        with pytest.raises(tt.UserError, match="has no half"), shifted_in(llama(), group):
            pass


def test_cost_grows_with_the_length_not_its_square() -> None:
    """Scores made in a row of 64 groups: those of the groups, nowhere a (tokens, tokens) matrix."""
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for tokens in (256, 1024):
        q, k, v = (torch.randn(1, 2, tokens, 8) for _ in range(3))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            shifted_attention(Training().train(), q, k, v, None, group=16)
        counts.append(counter.get_total_flops())
    assert counts[1] == pytest.approx(4 * counts[0], rel=0.05)
