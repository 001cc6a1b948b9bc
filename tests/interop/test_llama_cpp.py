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
from trimtab.interop.gguf_lora import write_gguf_lora
from trimtab.interop.gguf_model import write_gguf_model
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
