"""Tiny model directories, made in the test's own directory: random weights, a tokenizer of a few words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORDS = "<unk> <pad> <s> </s> <mask> the a capital of France is Paris yes no it was good bad film . ?".split()


def small_tokenizer(**special: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=64, **special)


def small_config(family: str, **fields: Any) -> Any:
    import transformers

    wide = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    common: dict[str, Any] = {"vocab_size": len(WORDS), "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    shapes: dict[str, dict[str, Any]] = {
        "Llama": {**wide, "num_key_value_heads": 1, "max_position_embeddings": 48},
        "Bert": {**wide, "max_position_embeddings": 40},
        "Roberta": {**wide, "max_position_embeddings": 42},
        "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
        "T5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 1},
    }
    return getattr(transformers, f"{family}Config")(**{**common, **shapes[family], **fields})


@pytest.fixture
def model_directory(tmp_path: Path) -> Callable[..., Path]:
    """A function that saves a tiny model: `model_directory("LlamaForCausalLM", tokenizer={...}, **config fields)`."""

    def make(architecture: str, *, name: str = "model", tokenizer: dict[str, str] | None = None, **fields: Any) -> Path:
        import torch
        import transformers

        family = next(start for start in ("Llama", "Bert", "Roberta", "GPT2", "T5") if architecture.startswith(start))
        torch.manual_seed(1)
        directory = tmp_path / name
        shards = {"max_shard_size": fields.pop("max_shard_size")} if "max_shard_size" in fields else {}
        getattr(transformers, architecture)(small_config(family, **fields)).save_pretrained(directory, **shards)
        special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        small_tokenizer(**(special if tokenizer is None else tokenizer)).save_pretrained(directory)
        return directory

    return make
