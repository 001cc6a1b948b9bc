"""gpt-oss: experts are raw tensors (experts, in, out) whose gate and up alternate, so only the whole is a place.

The MoE module returns (output, router scores); `ffn` means the output.
"""

from __future__ import annotations

from trimtab.core.family import Family

FAMILY = Family(
    name="gpt_oss",
    model_types=("gpt_oss",),
    blocks={"layers": None},
    roles={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "expert_gate_up": "mlp.experts.gate_up_proj",
        "expert_down": "mlp.experts.down_proj",
        "attn": "self_attn.o_proj",
        "ffn": "mlp",
    },
    transposed=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    outside={"embed": "embed_tokens"},
    enters={"attn": "input_layernorm", "ffn": "post_attention_layernorm"},
)
