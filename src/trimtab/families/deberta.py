"""DeBERTa: BERT's layout. Version 1 has q, k and v head by head in one weight, `in_proj`."""

from __future__ import annotations

from trimtab.core.family import Family

FAMILY = Family(
    name="deberta",
    model_types=("deberta", "deberta-v2"),
    blocks={"encoder.layer": None},
    roles={
        "qkv": "attention.self.in_proj",
        "q": ("attention.self.query_proj", "attention.self.in_proj:q"),
        "k": ("attention.self.key_proj", "attention.self.in_proj:k"),
        "v": ("attention.self.value_proj", "attention.self.in_proj:v"),
        "o": "attention.output.dense",
        "up": "intermediate.dense",
        "down": "output.dense",
        "attn": "attention.output.dropout",
        "ffn": "output.dropout",
        "stream": "output.LayerNorm",
    },
    by_head=("attention.self.in_proj",),
    outside={"embed": "word_embeddings"},
    enters={"attn": "attention", "ffn": "intermediate"},
)
