"""Tiny random models of six shapes, and what a test needs to compare adapters with the peer library."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch

VOCABULARY = 60
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.1}


def make(kind: str) -> Any:
    """A random model of one shape, the same every time."""
    return copy.deepcopy(drawn(kind))


@cache
def drawn(kind: str) -> Any:
    """The one model of a shape that all others are copies of."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        BloomConfig,
        BloomForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    torch.manual_seed(1)
    if kind in ("llama", "tied"):
        config = LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=kind == "tied")
        return LlamaForCausalLM(config).eval()
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.1)
        ).eval()
    if kind == "neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)).eval()
    if kind == "bloom":
        return BloomForCausalLM(
            BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.1)
        ).eval()
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(**SIZES, num_labels=3)).eval()
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        tie_word_embeddings=kind == "tied t5",
        initializer_factor=0.3,
    )
    return T5ForConditionalGeneration(config).eval()


def logits(model: Any) -> torch.Tensor:
    """The logits of fixed rows; of an encoder-decoder, of the decoder's last positions."""
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
    encoder = bool(getattr(model.config, "is_encoder_decoder", False))
    with torch.no_grad():
        if encoder:
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=ids[:, :5]).logits
            return out[:, -5:]
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return out if out.ndim == 2 else out[:, -9:]


@pytest.fixture
def fresh() -> Any:
    """Makes a tiny model by the name of its shape."""
    return make
