"""GPT-NeoX (Pythia): q, k and v head by head in one weight.

Attention and feed-forward each end in a dropout of the block's own.
"""

from __future__ import annotations

from trimtab.core.family import Family

FAMILY = Family(
    name="neox",
    model_types=("gpt_neox",),
    blocks={"layers": None},
    roles={
        "qkv": "attention.query_key_value",
        "q": "attention.query_key_value:q",
        "k": "attention.query_key_value:k",
        "v": "attention.query_key_value:v",
        "o": "attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
        "attn": "post_attention_dropout",
        "ffn": "post_mlp_dropout",
    },
    by_head=("attention.query_key_value",),
    outside={"embed": "embed_in"},
    enters={"attn": "input_layernorm", "ffn": "post_attention_layernorm"},
)
