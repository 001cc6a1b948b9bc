"""ViT: pre-norm. One dropout serves both sub-layers, so `attn` is the output projection and `ffn` the MLP before it.

`embed` is the convolution that makes patches into tokens.
"""

from __future__ import annotations

from trimtab.core.family import Family

FAMILY = Family(
    name="vit",
    model_types=("vit", "deit", "ijepa", "vit_msn"),
    blocks={"layers": None},
    roles={
        "q": "attention.q_proj",
        "k": "attention.k_proj",
        "v": "attention.v_proj",
        "o": "attention.o_proj",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
        "attn": "attention.o_proj",
        "ffn": "mlp",
    },
    outside={"embed": "patch_embeddings.projection"},
    enters={"attn": "layernorm_before", "ffn": "layernorm_after"},
)
