"""Tiny language models of transformers as hosts: a decoder of each style, an encoder, an encoder-decoder."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from trimtab.laws import Host

WORDS = 29
"""Size of the vocabulary."""


def llama() -> nn.Module:
    """Rotary positions, grouped keys, tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            initializer_range=0.2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            use_cache=False,
        )
    )


def gpt2() -> nn.Module:
    """Learned positions, Conv1D, fused q, k and v."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=WORDS,
            n_embd=24,
            n_layer=1,
            n_head=4,
            n_positions=64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            initializer_range=0.2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            use_cache=False,
        )
    )


def bert() -> nn.Module:
    """Bidirectional, post-norm, with a classifier."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=WORDS,
            hidden_size=24,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=40,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.2,
            num_labels=3,
        )
    )


def t5() -> nn.Module:
    """Encoder and decoder, relative positions, no biases."""
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=WORDS,
            d_model=24,
            d_kv=6,
            d_ff=40,
            num_layers=1,
            num_heads=4,
            dropout_rate=0.0,
            initializer_factor=1.0,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
            use_cache=False,
        )
    )


def text(rows: int) -> dict[str, Tensor]:
    """Ids and a mask; the first row is padded on the left."""
    mask = torch.ones(rows, 13, dtype=torch.long)
    mask[0, :2] = 0
    return {"input_ids": torch.randint(3, WORDS, (rows, 13)), "attention_mask": mask}


def pair(rows: int) -> dict[str, Tensor]:
    """Text for an encoder, and a shorter one for its decoder."""
    return text(rows) | {"decoder_input_ids": torch.randint(3, WORDS, (rows, 5))}


@cache
def hosts() -> tuple[Host, ...]:
    """One host per model; the methods go where they go by default."""
    made = {"llama": (llama, text), "gpt2": (gpt2, text), "bert": (bert, text), "t5": (t5, pair)}
    return tuple(
        Host(name, "model", build, inputs, None, ("all-linear",), lambda result: result.logits)
        for name, (build, inputs) in made.items()
    )
