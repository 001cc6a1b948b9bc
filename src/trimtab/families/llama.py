"""Llama and the many decoders built the same way: pre-norm, separate projections, a gated MLP or a plain one.

`attn` is o_proj and `ffn` the MLP: their outputs are what is added to the residual stream (Granite scales them first).
Gemma 1 belongs here; Gemma 2 and 3 norm a sub-layer's output before adding it and have their own table.
"""

from __future__ import annotations

from trimtab.core.family import Family

FAMILY = Family(
    name="llama",
    model_types=(
        *("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "gemma", "smollm3", "granite", "olmo"),
        *("cohere", "cohere2", "helium", "nemotron", "arcee", "seed_oss", "apertus", "ernie4_5"),
    ),
    blocks={"layers": None},
    roles={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
        "attn": "self_attn.o_proj",
        "ffn": "mlp",
    },
    outside={"embed": "embed_tokens"},
    enters={
        "attn": ("input_layernorm", "attention_layernorm"),
        "ffn": ("post_attention_layernorm", "feedforward_layernorm", "input_layernorm"),
    },
)
