"""Tiny random decoders and a byte-level tokenizer for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}


def byte_tokenizer() -> Any:
    """One token per byte, so that most characters outside ASCII are several tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<pad>")
    made.clean_up_tokenization_spaces = False
    return made


def decoder(kind: str = "llama", **changes: Any) -> Any:
    """A random decoder over the byte vocabulary, far enough from uniform that no two logits tie."""
    torch.manual_seed(0)
    words = byte_tokenizer()
    sizes = {**SIZES, "vocab_size": len(words), "pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id}
    sizes |= {"bos_token_id": None}
    if kind == "llama":
        sizes |= {"num_key_value_heads": 2, "intermediate_size": 48}
    config = transformers.AutoConfig.for_model(kind, **(sizes | changes))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator)
    model.config.eos_token_id = model.generation_config.eos_token_id = words.eos_token_id
    return model
