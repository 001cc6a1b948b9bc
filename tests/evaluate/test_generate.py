"""Generation: equal to transformers' own greedy search, whatever is attached, however it is batched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.evaluate.tiny_generators import byte_tokenizer, decoder

import trimtab as tt
from trimtab.core.errors import UserError
from trimtab.evaluate.generate import generate, pieces, room_of, stop_ids, stream

PROMPTS = [[7, 30, 41], [90], [33, 34, 35, 36, 37, 38, 39], [60, 61], [5, 5, 5, 5, 200]]


@pytest.fixture(scope="module")
def words() -> Any:
    return byte_tokenizer()


def adapted(kind: str, method: Any, quantize: Any = None) -> Any:
    """A decoder with a method attached and moved away from its start."""
    model = decoder(kind)
    if quantize is not None:
        tt.quantize(model, quantize)
    if method is not None:
        tt.attach(model, method)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def reference(model: Any, tokenizer: Any, prompt: list[int], count: int) -> str:
    """Greedy search of transformers on one prompt, without padding."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)


CASES = {
    "llama": lambda: adapted("llama", None),
    "gpt2": lambda: adapted("gpt2", None),
    "lora": lambda: adapted("llama", tt.LoRA(rank=4)),
    "lora on nf4": lambda: adapted("llama", tt.LoRA(rank=4), tt.NF4(block_size=32)),
    "houlsby": lambda: adapted("gpt2", tt.Houlsby(bottleneck=8)),
    "prefix": lambda: adapted("llama", tt.PrefixTuning(length=5, hidden=None)),
    "prefix, learned positions": lambda: adapted("gpt2", tt.PrefixTuning(length=5, hidden=None)),
    "loreft": lambda: adapted("llama", tt.LoReFT(rank=2)),
}


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_generate_equals_greedy_search_one_by_one_and_padded(make: Any, words: Any) -> None:
    model = make()
    wanted = [reference(model, words, prompt, 12) for prompt in PROMPTS]
    assert generate(model, words, PROMPTS, 12, batch_size=1) == wanted
    assert generate(model, words, PROMPTS, 12, batch_size=3) == wanted
    assert ["".join(stream(model, words, prompt, 12)) for prompt in PROMPTS] == wanted


def test_generate_ends_at_the_stop_token_and_leaves_it_out(words: Any) -> None:
    model = decoder()
    bias = torch.zeros(len(words))
    first = int(generate_ids(model, words, PROMPTS[0], 1)[0])
    bias[words.eos_token_id] = 1e6
    head = model.lm_head
    calls = []

    def stop_second(module: Any, args: Any, output: Any) -> Any:
        calls.append(1)
        return output + bias if len(calls) > 1 else output

    handle = head.register_forward_hook(stop_second)
    assert generate(model, words, [PROMPTS[0]], 20) == [words.decode([first])]
    assert len(calls) == 2
    handle.remove()


def generate_ids(model: Any, words: Any, prompt: list[int], count: int) -> list[int]:
    out = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=count, do_sample=False
    )
    return out[0, len(prompt) :].tolist()


def test_progress_order_and_mode(words: Any) -> None:
    model = decoder().train()
    seen: list[tuple[int, int]] = []
    generate(model, words, PROMPTS, 2, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert model.training
    assert generate(model, words, [], 2) == []


def test_a_model_without_a_cache_is_run_again_from_the_start(words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder()
    wanted = generate(model, words, PROMPTS, 6)
    inner = model.forward

    def forgetful(input_ids: Any, attention_mask: Any = None, position_ids: Any = None) -> Any:
        output = inner(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
        output.past_key_values = None
        return output

    monkeypatch.setattr(model, "forward", forgetful)
    assert generate(model, words, PROMPTS, 6) == wanted


def test_text_stops_where_positions_end(words: Any) -> None:
    for kind in ("llama", "gpt2"):
        model = decoder(kind)
        long = [40] * 60
        for count in (4, 50):
            rows = generate(model, words, [long, [40] * 10], count, batch_size=2)
            assert rows[0] == generate(model, words, [long], 4)[0]
            assert rows[1] == generate(model, words, [[40] * 10], count)[0]
        assert "".join(stream(model, words, long, 50)) == rows[0]
    virtual = adapted("gpt2", tt.PrefixTuning(length=5, hidden=None))
    assert (room_of(model), room_of(virtual)) == (64, 59)


def test_sampling_depends_on_its_seed_alone(words: Any) -> None:
    model = decoder()
    state = torch.get_rng_state()
    one = "".join(stream(model, words, PROMPTS[0], 20, temperature=1.0, seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert "".join(stream(model, words, PROMPTS[0], 20, temperature=1.0, seed=3)) == one
    others = {"".join(stream(model, words, PROMPTS[0], 20, temperature=1.0, seed=seed)) for seed in range(5)}
    assert len(others) > 1
    assert (
        "".join(stream(model, words, PROMPTS[0], 20, temperature=1e-4, seed=0))
        == generate(model, words, PROMPTS[:1], 20)[0]
    )


@pytest.mark.parametrize("text", ["naïve café", "日本語のテキスト", "🙂👩‍👩‍👧 ok", "a\nb\tc  d", "", "é"])
def test_pieces_never_split_a_character(text: str, words: Any) -> None:
    ids = words(text)["input_ids"]
    made = list(pieces(words, iter(ids)))
    assert "".join(made) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(made)
    assert len(made) == len(text)  # one token per byte: every character comes as soon as it is whole


def test_broken_bytes_come_out_at_the_end_rather_than_never(words: Any) -> None:
    ids = words("né")["input_ids"][:-1]
    assert "".join(pieces(words, iter(ids))) == "n\N{REPLACEMENT CHARACTER}"
    assert list(pieces(words, iter([words.eos_token_id]))) == []


def test_pieces_of_a_tokenizer_that_marks_spaces() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {piece: number for number, piece in enumerate(["<unk>", "▁the", "▁cat", "s", "▁sat", "."])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", clean_up_tokenization_spaces=False)
    ids = [1, 2, 3, 4, 5]
    assert "".join(pieces(made, iter(ids))) == made.decode(ids) == "the cats sat."


def test_an_abandoned_stream_leaves_the_model_as_it_was(words: Any) -> None:
    model = decoder().train()
    source = stream(model, words, PROMPTS[0], 20)
    assert isinstance(source, Iterator)
    next(source)
    assert not model.training
    assert torch.is_grad_enabled()
    source.close()  # type: ignore[attr-defined]
    assert model.training


def test_the_token_that_closes_a_turn_in_training_also_stops(words: Any) -> None:
    chat = byte_tokenizer()
    chat.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    chat.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}<turn>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    model = decoder()
    assert stop_ids(model, words) == {words.eos_token_id}
    assert stop_ids(model, chat) == {words.eos_token_id, chat.convert_tokens_to_ids("<turn>")}


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [([[]], 5, "prompt 1 has no tokens"), ([[1] * 64], 5, "prompt 1 has 64 tokens"), ([[1]], 0, "max_new_tokens=0")],
)
def test_what_cannot_be_generated_is_refused(prompts: Any, count: int, message: str, words: Any) -> None:
    with pytest.raises(UserError, match=message):
        generate(decoder(), words, prompts, count)
    with pytest.raises(UserError, match=message):
        stream(decoder(), words, prompts[0], count)


def test_a_negative_temperature_is_refused(words: Any) -> None:
    with pytest.raises(UserError, match="negative"):
        stream(decoder(), words, [1], 5, temperature=-1)


def test_an_encoder_decoder_answers_as_transformers_does(words: Any) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"vocab_size": len(words), "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    start = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": words.eos_token_id}
    model = T5ForConditionalGeneration(T5Config(**sizes, **start, initializer_factor=6.0)).eval()
    prompts = [[5, 9, 13], [7, 8], [20, 21, 22, 23, 24]]
    expected = []
    for prompt in prompts:
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, 1:]
        expected.append(words.decode(ids, skip_special_tokens=True))
    assert len(set(expected)) == 3
    assert generate(model, words, prompts, 6) == expected
    assert "".join(stream(model, words, prompts[0], 6)) == expected[0]
