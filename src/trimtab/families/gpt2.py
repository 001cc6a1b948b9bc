"""GPT-2: Conv1D weights (in, out), q, k and v in one; the attention module returns a tuple, its last dropout does not.

With cross-attention, k and v of the encoder's states are one weight and q is its own.
"""

from __future__ import annotations

from trimtab.core.family import Family

FAMILY = Family(
    name="gpt2",
    model_types=("gpt2", "imagegpt"),
    blocks={"h": None},
    roles={
        "qkv": "attn.c_attn",
        "q": "attn.c_attn:q",
        "k": "attn.c_attn:k",
        "v": "attn.c_attn:v",
        "o": "attn.c_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
        "attn": "attn.resid_dropout",
        "ffn": "mlp.dropout",
        "cross.q": "crossattention.q_attn",
        "cross.kv": "crossattention.c_attn",
        "cross.k": "crossattention.c_attn:k",
        "cross.v": "crossattention.c_attn:v",
        "cross.o": "crossattention.c_proj",
        "cross.attn": "crossattention.resid_dropout",
    },
    fused={"attn.c_attn": {"q": 1, "k": 1, "v": 1}, "crossattention.c_attn": {"k": 1, "v": 1}},
    outside={"embed": "wte"},
    enters={"attn": "ln_1", "cross.attn": "ln_cross_attn", "ffn": "ln_2"},
)
