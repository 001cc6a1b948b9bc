"""GGUF files in llama.cpp itself, where its bindings are installed: greedy answers are those of the model here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.conftest import tokenizer

import trimtab as tt
from trimtab.interop.gguf_lora import spelled, write_gguf_lora
from trimtab.interop.gguf_model import add_tokenizer, words_of, write_gguf_model
from trimtab.interop.saved import saved_of

pytest.importorskip("xllamacpp")
pytestmark = pytest.mark.slow

ANSWER = """
import json, os, sys, xllamacpp
model, text, lora = sys.argv[1:4]
p = xllamacpp.CommonParams()
p.model.path, p.n_ctx, p.n_predict, p.warmup, p.sampling.temp = model, 256, 12, False, 0.0
p.cpuparams.n_threads = 1
if lora != "none":
    p.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(lora, 1.0)]
found = xllamacpp.Server(p).handle_completions({"prompt": text, "max_tokens": 12, "temperature": 0})
found = json.loads(found) if isinstance(found, str) else found
print(json.dumps(found.get("content") or found["choices"][0]["text"]), flush=True)
os._exit(0)
"""


def made(words: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": len(words), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    ids = {"bos_token_id": None, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    config = transformers.LlamaConfig(**sizes, **ids, initializer_range=0.3, tie_word_embeddings=False)
    return transformers.LlamaForCausalLM(config).eval()


def here(model: Any, words: Any, text: str) -> str:
    ids = torch.tensor([words(text).input_ids])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    return str(words.decode(out[0, ids.shape[1] :]))


def there(model: Path, text: str, lora: str = "none") -> str:
    command = [sys.executable, "-c", ANSWER, str(model), text, lora]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return str(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("where", ["q, k, v, down", "embed", "head"])
def test_answers_are_the_same(where: str, tmp_path: Path) -> None:
    words, text = tokenizer(True), "red green blue"
    base = made(words)
    write_gguf_model(base, words, tmp_path / "base.gguf")
    plain = here(base, words, text)
    assert there(tmp_path / "base.gguf", text) == plain
    model = tt.attach(made(words), tt.LoRA(rank=4, alpha=8.0), where)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.3 * torch.randn_like(value))
    write_gguf_lora(made(words), saved_of(model), tmp_path / "lora.gguf")
    tuned = here(model, words, text)
    assert tuned != plain
    assert there(tmp_path / "base.gguf", text, str(tmp_path / "lora.gguf")) == tuned
    tt.merge(model)
    write_gguf_model(model, words, tmp_path / "merged.gguf")
    assert there(tmp_path / "merged.gguf", text) == tuned


PAIRED = ("smollm3", "arcee", "olmo")
"""Beside Llama: those whose converter gives every head's halves in turn."""
KEYS = {"gpt_neox": 4, "bloom": 4, "falcon": 2}
"""Key heads of those whose q, k and v are head by head in one weight, and one after the other in the file."""


def drawn(model_type: str, words: Any) -> Any:
    """A random model of one architecture, loud enough for an adapter to change its answers."""
    import transformers

    ids = {"bos_token_id": None, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": False}
    if model_type in PAIRED:
        sizes |= {"intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 256}
    if model_type == "gpt_neox":
        sizes |= {"intermediate_size": 256, "max_position_embeddings": 256}
    if model_type == "bloom":
        sizes = {"hidden_size": 64, "n_layer": 2, "n_head": 4}
    if model_type == "falcon":
        sizes |= {"new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": True}
    config = transformers.AutoConfig.for_model(model_type, vocab_size=len(words), **sizes, **ids)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    draw = torch.Generator().manual_seed(1)
    for one in model.parameters():
        one.data = torch.randn(one.shape, generator=draw) * (0.3 if one.ndim > 1 else 0.2)
    return model


def in_file_order(model_type: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Rows as llama.cpp's converter puts them."""
    if "query_key_value" in name:
        keys = KEYS[model_type]
        groups = tensor.view(keys, 4 // keys + 2, -1, *tensor.shape[1:])
        return torch.cat(
            [one.reshape(-1, *tensor.shape[1:]) for one in (groups[:, :-2], groups[:, [-2]], groups[:, [-1]])]
        )
    if model_type in PAIRED and ("q_proj" in name or "k_proj" in name):
        halves = tensor.reshape(4 if "q_proj" in name else 2, 2, -1, tensor.shape[1])
        return halves.swapaxes(1, 2).reshape(tensor.shape)
    return tensor


def write_base(model: Any, words: Any, path: Path) -> None:
    """A whole model of an architecture whose models Trimtab itself does not write."""
    import gguf

    config = model.config
    arch = config.model_type.replace("gpt_", "gpt")
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_name(arch)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2 if config.model_type in (*PAIRED, "falcon") else 4)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or 256)
    if config.model_type in ("smollm3", "arcee"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(getattr(config, "layer_norm_epsilon", None) or 1e-5)
    if config.model_type != "bloom":
        rotary = config.rope_parameters
        writer.add_rope_freq_base(float(rotary["rope_theta"]))
        writer.add_rope_dimension_count(int(16 * rotary.get("partial_rotary_factor", 1.0)))
    if arch == "gptneox":
        writer.add_parallel_residual(config.use_parallel_residual)
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer, words, words_of(words), config)
    names = spelled(config, arch)
    for name, value in model.state_dict().items():
        endings = {"try_suffixes": (".weight", ".bias")}
        there = names.get_name(name, **endings) or names.get_name(name.removeprefix("transformer."), **endings)
        writer.add_tensor(there, in_file_order(config.model_type, name, value).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("model_type", [*PAIRED, *KEYS])
def test_rows_are_in_the_order_of_the_architecture(model_type: str, tmp_path: Path) -> None:
    words, text = tokenizer(True), "red green blue"
    base = drawn(model_type, words)
    write_base(base, words, tmp_path / "base.gguf")
    model = tt.attach(drawn(model_type, words), tt.LoRA(rank=4, alpha=8.0), "q, k, v")
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(1.5 * torch.randn(value.shape, generator=draw))
    write_gguf_lora(base, saved_of(model), tmp_path / "lora.gguf")
    tuned = here(model, words, text)
    assert tuned != here(base, words, text)
    assert there(tmp_path / "base.gguf", text, str(tmp_path / "lora.gguf")) == tuned
