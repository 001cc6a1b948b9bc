"""Methods that know positions or attention, in language models: generating, padding, recomputing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from trimtab.core.stack import prompts

pytest.importorskip("transformers")

WORDS = 31
METHODS = {
    "prefix": tt.PrefixTuning(length=4, hidden=8),
    "prefix-direct": tt.PrefixTuning(length=4, hidden=None),
    "prompt": tt.PromptTuning(length=4, start="random"),
    "lstm": tt.PTuningLSTM(length=3),
    "pre_layer": tt.PreLayer(length=3),
    "llama_adapter": tt.LLaMAAdapter(length=3),
    "loreft": tt.LoReFT(rank=2, first=2, last=2),
    "untied": tt.Untied(inner=tt.DiReFT(rank=2, first=2, last=1)),
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": WORDS, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **SPECIAL)).eval()


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": WORDS, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 40, "initializer_range": 0.3}
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **drops, **SPECIAL)).eval()


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": WORDS, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": None, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(**sizes, **ids)).eval()


def adapted(make: Callable[[], Any], method: Any, seed: int = 5) -> Any:
    """A model with the method on it, its tensors far from their start."""
    torch.manual_seed(seed)
    model = tt.attach(make(), method)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.4 * torch.randn_like(parameter))
    return model


def texts(rows: int = 3, length: int = 7) -> tuple[Tensor, Tensor]:
    """Prompts of different length, padded on the left."""
    ids = torch.randint(3, WORDS, (rows, length))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : 2 * row] = 0
    return ids.masked_fill(mask == 0, 0), mask


def step_by_step(model: Any, ids: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Greedy decoding of one unpadded prompt after the other, the whole text again for every token."""
    rows = []
    for row in range(len(ids)):
        text = ids[row][mask[row].bool()][None]
        asked = text.shape[1]
        for _ in range(steps):
            labels = text.clone()
            labels[:, :asked] = -100
            with prompts(model, labels):
                logits = model(input_ids=text, use_cache=False).logits
            text = torch.cat([text, logits[:, -1].argmax(-1, keepdim=True)], 1)
        rows.append(text[0, asked:])
    return torch.stack(rows)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_generating_is_decoding_step_by_step(make: Callable[[], Any], name: str) -> None:
    model = adapted(make, METHODS[name])
    ids, mask = texts()
    with torch.no_grad():
        found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        assert torch.equal(found[:, : ids.shape[1]], ids), "virtual tokens are seen by the caller"
        assert torch.equal(found[:, ids.shape[1] :], step_by_step(model, ids, mask, 6))
        tt.activate(model, None)
        plain = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert not torch.equal(plain, found), "the adapter changes nothing, so this test shows nothing"


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("make", [llama, gpt2, t5])
def test_beam_search_and_sampling_run(make: Callable[[], Any], name: str) -> None:
    model = adapted(make, METHODS[name])
    ids, mask = texts()
    with torch.no_grad():
        beams = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, num_beams=3, do_sample=False)
        alone = model.generate(input_ids=ids[:1], attention_mask=mask[:1], max_new_tokens=5, num_beams=3)
        drawn = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=True, top_k=5)
    assert len(beams) == len(drawn) == 3
    assert torch.equal(beams[:1], alone), "a beam of one row depends on the other rows"


@pytest.mark.parametrize("name", METHODS)
def test_generating_in_an_encoder_decoder(name: str) -> None:
    model = adapted(t5, METHODS[name])
    ids, mask = texts()
    with torch.no_grad():
        found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        text = torch.zeros(len(ids), 1, dtype=torch.long)
        for _ in range(5):
            labels = text.clone()
            labels[:, :1] = -100
            with prompts(model, labels):
                logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=text, use_cache=False).logits
            text = torch.cat([text, logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, text)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_padding_changes_nothing(make: Callable[[], Any], name: str) -> None:
    """A left-padded row gives the logits of the same text alone, positions counted from its first token."""
    model = adapted(make, METHODS[name])
    ids, mask = texts()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        for row in range(len(ids)):
            text = ids[row][mask[row].bool()][None]
            torch.testing.assert_close(together[row][mask[row].bool()], model(input_ids=text).logits[0])


@pytest.mark.parametrize("name", METHODS)
def test_rows_of_a_generated_batch_use_their_own_adapters(name: str) -> None:
    model = adapted(llama, METHODS[name])
    tt.attach(model, METHODS[name], name="other", seed=9)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".other" in key:
                parameter.add_(0.3)
    ids, mask = texts()
    wanted = ["default", None, "other"]
    with torch.no_grad():
        tt.activate(model, wanted)
        found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        for row, one in enumerate(wanted):
            tt.activate(model, one)
            alone = {"input_ids": ids[row : row + 1], "attention_mask": mask[row : row + 1]}
            assert torch.equal(found[row : row + 1], model.generate(**alone, max_new_tokens=5, do_sample=False)), one


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_recomputing_on_a_quantized_base_then_reloading_to_train(
    make: Callable[[], Any], name: str, tmp_path: Path
) -> None:
    def quantized() -> Any:
        torch.manual_seed(5)
        return tt.quantize(make(), tt.NF4(double=True))

    model = adapted(quantized, METHODS[name]).train()
    ids, mask = texts()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :5] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def gradients(one: Any) -> list[Tensor]:
        one.zero_grad()
        one(**batch).loss.backward()
        return [parameter.grad.clone() for parameter in one.parameters() if parameter.requires_grad]

    plain = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for found, wanted in zip(gradients(model), plain, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))
    tt.save(model, tmp_path)
    again = tt.load(quantized(), tmp_path).train()
    for found, wanted in zip(gradients(again), plain, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    still = [name for name, one in zip(names, plain, strict=True) if not one.any()]
    # After the last block nothing reads the first tokens of a prompt, so their own tensors have nothing to learn there.
    assert all(".1.delta" in name and ".first." in name for name in still)


def test_labels_tell_where_the_prompt_ends() -> None:
    """LoReFT edits the same positions in training, where labels mark the answer, as in generating."""
    model = adapted(llama, METHODS["loreft"])
    ids, mask = texts(rows=2)
    answer = torch.randint(3, WORDS, (2, 4))
    whole = torch.cat([ids, answer], 1)
    labels = torch.cat([torch.full_like(ids, -100), answer], 1)
    with torch.no_grad():
        trained = model(input_ids=whole, attention_mask=torch.cat([mask, torch.ones_like(answer)], 1), labels=labels)
        asked = model(input_ids=ids, attention_mask=mask, use_cache=True)
        rest = model(
            input_ids=answer,
            attention_mask=torch.cat([mask, torch.ones_like(answer)], 1),
            past_key_values=asked.past_key_values,
        )
    real = mask.bool()
    torch.testing.assert_close(trained.logits[:, : ids.shape[1]][real], asked.logits[real])
    torch.testing.assert_close(trained.logits[:, ids.shape[1] :], rest.logits)


def test_virtual_tokens_leave_losses_logits_and_hidden_states_their_lengths() -> None:
    model = adapted(llama, METHODS["prefix"])
    ids, mask = texts()
    out = model(input_ids=ids, attention_mask=mask, labels=ids, output_hidden_states=True)
    assert out.logits.shape[:2] == ids.shape
    assert {one.shape[1] for one in out.hidden_states} == {ids.shape[1]}
    assert out.loss.isfinite()


@pytest.mark.parametrize("name", ["prompt", "prefix", "pre_layer", "llama_adapter"])
@pytest.mark.parametrize("family", ["bert", "roberta", "t5"])
def test_padding_changes_nothing_in_an_encoder(family: str, name: str) -> None:
    """Virtual tokens stand at the same distance from the text and at the same position, however long the batch is."""
    model = adapted({"bert": bert, "roberta": roberta, "t5": t5}[family], METHODS[name])
    ids = torch.randint(3, WORDS, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    more = {"decoder_input_ids": torch.randint(3, WORDS, (3, 4))} if family == "t5" else {}
    with torch.no_grad():
        together = model(input_ids=ids.masked_fill(mask == 0, 0), attention_mask=mask, **more).logits
        for row in range(3):
            one = {key: value[row : row + 1] for key, value in more.items()}
            alone = model(input_ids=ids[row : row + 1, : mask[row].sum()], **one).logits
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**ENCODER, initializer_range=0.3)).eval()


def roberta() -> Any:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    return RobertaForSequenceClassification(RobertaConfig(**ENCODER, initializer_range=0.3, pad_token_id=0)).eval()


ENCODER = {"vocab_size": WORDS, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER |= {"intermediate_size": 40, "max_position_embeddings": 40, "num_labels": 3}


def test_attention_that_is_not_torchs_is_refused() -> None:
    model = adapted(llama, METHODS["llama_adapter"])
    model.set_attn_implementation("eager")
    with pytest.raises(tt.UserError, match="scaled_dot_product_attention"):
        model(input_ids=texts()[0])


def test_the_top_layers_get_a_prompt() -> None:
    model = adapted(llama, METHODS["llama_adapter"])
    assert [name for name, module in model.named_modules() if "delta" in module._modules] == [
        "model.layers.0.self_attn",
        "model.layers.1.self_attn",
    ]
    tt.detach(model)
    tt.attach(model, METHODS["llama_adapter"], where="attention@-1:")
    assert not hasattr(model.model.layers[0].self_attn, "delta")


def test_a_four_dimensional_mask_is_refused() -> None:
    model = adapted(llama, METHODS["prefix"])
    ids, _ = texts()
    with pytest.raises(tt.UserError, match="2-D attention mask"):
        model(input_ids=ids, attention_mask=torch.zeros(3, 1, 7, 7))
