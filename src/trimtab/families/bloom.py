"""BLOOM and Falcon: q, k and v head by head in one weight; Falcon's query heads share key heads.

BLOOM adds the residual inside its MLP module, so `ffn` is the projection before that.
"""

from __future__ import annotations

from trimtab.core.family import Family

FAMILY = Family(
    name="bloom",
    model_types=("bloom", "falcon"),
    blocks={"h": None},
    roles={
        "qkv": "self_attention.query_key_value",
        "q": "self_attention.query_key_value:q",
        "k": "self_attention.query_key_value:k",
        "v": "self_attention.query_key_value:v",
        "o": "self_attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
        "attn": "self_attention.dense",
        "ffn": "mlp.dense_4h_to_h",
    },
    by_head=("self_attention.query_key_value",),
    outside={"embed": "word_embeddings"},
    enters={
        "attn": ("ln_attn", "input_layernorm"),
        "ffn": ("ln_mlp", "post_attention_layernorm", "input_layernorm"),
    },
)
