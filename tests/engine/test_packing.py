"""Packed rows, with common beginnings kept once, give the loss and gradients of every row on its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import trimtab as tt
from trimtab.data.batches import collate
from trimtab.data.encoded import Encoded
from trimtab.data.packing import pack
from trimtab.engine.attention import can_pack, segments_in
from trimtab.engine.loss import loss_sum, terms_of

WORDS = 61


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def qwen() -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return Qwen3ForCausalLM(config)


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(config, name, 0.0)
    return GPT2LMHeadModel(config)


def rows_with_common_beginnings() -> list[Encoded]:
    """Nine rows: a common system prompt, questions that some share, equal rows, one that is the start of another."""
    draw = torch.Generator().manual_seed(7)

    def words(count: int) -> list[int]:
        return torch.randint(0, WORDS, (count,), generator=draw).tolist()

    system, question = words(20), words(18)
    found = [system + (question if row % 2 else []) + words(3 + row) for row in range(6)]
    found += [found[3], found[3][:-2], words(9)]
    return [Encoded(ids, [at >= len(ids) // 2 for at in range(len(ids))], row=row) for row, ids in enumerate(found)]


def alone(model: torch.nn.Module, rows: list[Encoded]) -> torch.Tensor:
    """The loss summed over rows, each through the model on its own, with nothing of ours."""
    total = torch.zeros(())
    for row in rows:
        ids = torch.tensor([row.ids])
        keep = torch.tensor(row.trained[1:])
        logits = model(input_ids=ids).logits[0, :-1]
        total = total + F.cross_entropy(logits[keep], ids[0, 1:][keep], reduction="sum")
    return total


def agree(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> None:
    """Each gradient is within 1e-5 of the largest entry of all."""
    scale = max(float(gradient.abs().max()) for gradient in wanted)
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).abs().max()) <= 1e-5 * scale


@pytest.mark.parametrize("make", [llama, qwen, gpt2])
@pytest.mark.parametrize("share", [None, 4, 16])
@pytest.mark.parametrize("method", ["full", "lora", "houlsby"])
def test_packed_gradients_equal_those_of_rows_alone(make, share: int | None, method: str) -> None:
    torch.manual_seed(0)
    model = make().eval()
    if method == "lora":
        tt.attach(model, tt.LoRA(rank=4))
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                torch.nn.init.normal_(parameter, std=0.1)
    elif method == "houlsby":
        tt.attach(model, tt.Houlsby(bottleneck=8))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows = rows_with_common_beginnings()
    expected = alone(model, rows)
    wanted = torch.autograd.grad(expected, trained)
    packed = pack(rows, share)
    assert (packed.ids.shape[1] < packed.row_tokens) == (share is not None)
    assert can_pack(model, 64)
    with segments_in(model):
        loss, _ = loss_sum(model, packed, "causal")
        found = torch.autograd.grad(loss, trained)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    agree(found, wanted)


VIRTUAL = {
    "prompt": tt.PromptTuning(length=5, start="random"),
    "p_tuning": tt.PTuning(length=3),
    "prefix": tt.PrefixTuning(length=4, hidden=8),
    "pre_layer": tt.PreLayer(length=3),
    "llama_adapter": tt.LLaMAAdapter(length=3),
}


@pytest.mark.parametrize("make", [llama, qwen, gpt2])
@pytest.mark.parametrize("share", [None, 4])
@pytest.mark.parametrize("method", VIRTUAL)
def test_prompts_and_prefixes_are_exact_in_a_pack(make, share: int | None, method: str) -> None:
    torch.manual_seed(0)
    model = make().eval()
    tt.attach(model, VIRTUAL[method])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.3 * torch.randn_like(parameter))
    rows = rows_with_common_beginnings()
    expected = alone(model, rows)
    wanted = torch.autograd.grad(expected, trained)
    assert can_pack(model, 64)
    with segments_in(model):
        loss, _ = loss_sum(model, pack(rows, share), "causal")
        found = torch.autograd.grad(loss, trained)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert all(bool(gradient.any()) for gradient in wanted)
    agree(found, wanted)


def test_padded_packed_and_accumulated_agree() -> None:
    torch.manual_seed(0)
    model = llama().eval()
    rows = rows_with_common_beginnings()
    padded, _ = loss_sum(model, collate(rows, 0), "causal")
    with segments_in(model):
        packed, _ = loss_sum(model, pack(rows), "causal")
        halves = [loss_sum(model, pack(half), "causal")[0] for half in (rows[:4], rows[4:])]
    assert terms_of(collate(rows, 0)) == pack(rows).terms == sum(terms_of(pack(half)) for half in (rows[:4], rows[4:]))
    torch.testing.assert_close(packed, padded, rtol=1e-6, atol=0)
    torch.testing.assert_close(halves[0] + halves[1], padded, rtol=1e-6, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=9),
    st.one_of(st.none(), st.integers(1, 6)),
)
def test_every_row_can_be_read_back_from_a_pack(rows: list[list[int]], share: int | None) -> None:
    encoded = [Encoded(ids, [True] * len(ids), row=row) for row, ids in enumerate(rows)]
    packed = pack(encoded, share)
    ids, positions = packed.ids[0].tolist(), packed.positions[0].tolist()
    assert packed.terms == sum(len(row) - 1 for row in rows)
    assert sum(segment.stop - segment.start for segment in packed.segments) == len(ids)
    readable = set()
    for segment in packed.segments:
        path = [at for above in segment.ancestors for at in range(*span(packed.segments[above]))]
        path += range(*span(segment))
        assert [positions[at] for at in path] == list(range(len(path)))
        readable |= {tuple(ids[at] for at in path[: end + 1]) for end in range(len(path))}
    assert {tuple(row) for row in rows} <= readable


def span(segment) -> tuple[int, int]:
    return segment.start, segment.stop


def test_the_model_has_its_own_attention_back() -> None:
    model = llama().eval()
    before = model.config._attn_implementation
    ids = torch.randint(0, WORDS, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    wanted = model(input_ids=ids, attention_mask=mask).logits
    with segments_in(model):
        loss_sum(model, pack(rows_with_common_beginnings()), "causal")
    assert model.config._attn_implementation == before
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, wanted, rtol=0, atol=0)


def test_what_packing_would_get_wrong_is_not_packed() -> None:
    model = llama()
    assert can_pack(model, 64)
    model.config.sliding_window = 32
    assert not can_pack(model, 64)
    model = llama()
    model.config.sliding_window = 66
    tt.attach(model, tt.PrefixTuning(length=3, hidden=None))
    assert can_pack(model, 63)
    assert not can_pack(model, 64), "the virtual tokens reach out of the window"
    model.config.sliding_window = None
    tt.attach(model, tt.LoReFT(rank=2), name="edits")
    assert not can_pack(model, 64)
