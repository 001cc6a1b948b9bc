"""Phi-3 and GLM: gate and up in one weight, in Phi-3 also q, k and v, with rows in proportion to their heads.

`attn` and `ffn` are Phi-3's dropouts before the addition, GLM-4's norms there, else o_proj and the MLP.
"""

from __future__ import annotations

from trimtab.core.family import Family

FAMILY = Family(
    name="phi3",
    model_types=("phi3", "glm", "glm4"),
    blocks={"layers": None},
    roles={
        "qkv": "self_attn.qkv_proj",
        "q": ("self_attn.q_proj", "self_attn.qkv_proj:q"),
        "k": ("self_attn.k_proj", "self_attn.qkv_proj:k"),
        "v": ("self_attn.v_proj", "self_attn.qkv_proj:v"),
        "o": "self_attn.o_proj",
        "gate_up": "mlp.gate_up_proj",
        "gate": "mlp.gate_up_proj:gate",
        "up": "mlp.gate_up_proj:up",
        "down": "mlp.down_proj",
        "attn": ("resid_attn_dropout", "post_self_attn_layernorm", "self_attn.o_proj"),
        "ffn": ("resid_mlp_dropout", "post_mlp_layernorm", "mlp"),
    },
    fused={
        "self_attn.qkv_proj": {"q": "num_attention_heads", "k": "num_key_value_heads", "v": "num_key_value_heads"},
        "mlp.gate_up_proj": {"gate": 1, "up": 1},
    },
    outside={"embed": "embed_tokens"},
    enters={"attn": "input_layernorm", "ffn": "post_attention_layernorm"},
)
