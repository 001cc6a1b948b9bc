"""Gemma 2 and 3, OLMo 2 and 3: a sub-layer's output goes through a norm of its own before it is added.

What reaches the residual stream is that norm's output, so `attn` and `ffn` are the norms behind the sub-layers.
"""

from __future__ import annotations

from trimtab.core.family import Family

FAMILY = Family(
    name="gemma",
    model_types=("gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4"),
    blocks={"layers": None},
    roles={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
        "attn": "post_attention_layernorm",
        "ffn": "post_feedforward_layernorm",
    },
    outside={"embed": "embed_tokens"},
    enters={"attn": ("input_layernorm", "self_attn"), "ffn": ("pre_feedforward_layernorm", "mlp")},
)
