"""Segment Anything: the image encoder (stack `vision`, q, k and v in one weight) and the mask decoder (`decoder`).

In the mask decoder `q` is the tokens' attention to themselves and `cross.q` both directions between tokens and image,
the last attention behind the blocks included. `embed` is the patch convolution. There is no `head`.
"""

from __future__ import annotations

from trimtab.core.family import Family

FAMILY = Family(
    name="sam",
    model_types=("sam", "sam_vision_model", "sam_hq", "sam_hq_vision_model"),
    blocks={"vision_encoder.layers": "vision", "mask_decoder.transformer.layers": "decoder"},
    roles={
        "qkv": "vision/attn.qkv",
        "q": ("vision/attn.qkv:q", "decoder/self_attn.q_proj"),
        "k": ("vision/attn.qkv:k", "decoder/self_attn.k_proj"),
        "v": ("vision/attn.qkv:v", "decoder/self_attn.v_proj"),
        "o": ("vision/attn.proj", "decoder/self_attn.out_proj"),
        "up": "mlp.lin1",
        "down": "mlp.lin2",
        "attn": ("vision/attn.proj", "decoder/self_attn.out_proj"),
        "ffn": "mlp",
        **{f"cross.{role}": f"decoder/cross_attn_*.{role}_proj" for role in "qkv"},
        "cross.o": "decoder/cross_attn_*.out_proj",
        "cross.attn": "decoder/cross_attn_*.out_proj",
    },
    fused={"attn.qkv": {"q": 1, "k": 1, "v": 1}},
    outside={
        "embed": "patch_embed.projection",
        **{f"cross.{role}": f"final_attn_token_to_image.{role}_proj" for role in "qkv"},
        "cross.o": "final_attn_token_to_image.out_proj",
        "cross.attn": "final_attn_token_to_image.out_proj",
    },
    enters={"ffn": ("vision/layer_norm2", "decoder/mlp")},
)
