"""DeBERTa: BERT's layout. Version 1 interleaves q, k and v head by head in `in_proj`, so only the whole is a place."""

from __future__ import annotations

from trimtab.core.family import Family

FAMILY = Family(
    name="deberta",
    model_types=("deberta", "deberta-v2"),
    blocks={"encoder.layer": None},
    roles={
        "qkv": "attention.self.in_proj",
        "q": "attention.self.query_proj",
        "k": "attention.self.key_proj",
        "v": "attention.self.value_proj",
        "o": "attention.output.dense",
        "up": "intermediate.dense",
        "down": "output.dense",
        "attn": "attention.output.dropout",
        "ffn": "output.dropout",
        "stream": "output.LayerNorm",
    },
    outside={"embed": "word_embeddings"},
    enters={"attn": "attention", "ffn": "intermediate"},
)
