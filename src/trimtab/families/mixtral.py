"""Mixtral and other mixtures of experts: attention as in Llama, experts as raw tensors (experts, out, in).

An expert's gate and up are the halves of `gate_up_proj`. `gate`, `up` and `down` are the dense layers and the shared
expert, where there are any. The router is no role.
"""

from __future__ import annotations

from trimtab.core.family import Family

FAMILY = Family(
    name="mixtral",
    model_types=("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "minimax_m2", "phimoe", "dots1", "glm4_moe"),
    blocks={"layers": None},
    roles={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": ("mlp.gate_proj", "mlp.shared_expert.gate_proj", "mlp.shared_experts.gate_proj"),
        "up": ("mlp.up_proj", "mlp.shared_expert.up_proj", "mlp.shared_experts.up_proj"),
        "down": ("mlp.down_proj", "mlp.shared_expert.down_proj", "mlp.shared_experts.down_proj"),
        "expert_gate_up": "mlp.experts.gate_up_proj",
        "expert_gate": "mlp.experts.gate_up_proj:gate",
        "expert_up": "mlp.experts.gate_up_proj:up",
        "expert_down": "mlp.experts.down_proj",
        "attn": "self_attn.o_proj",
        "ffn": "mlp",
    },
    fused={"mlp.experts.gate_up_proj": {"gate": 1, "up": 1}},
    outside={"embed": "embed_tokens"},
    enters={"attn": "input_layernorm", "ffn": "post_attention_layernorm"},
)
