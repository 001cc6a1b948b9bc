"""MPNet: BERT's layout with the projections in `attention.attn`; a block returns a tuple."""

from __future__ import annotations

from trimtab.core.family import Family

FAMILY = Family(
    name="mpnet",
    model_types=("mpnet",),
    blocks={"encoder.layer": None},
    roles={
        "q": "attention.attn.q",
        "k": "attention.attn.k",
        "v": "attention.attn.v",
        "o": "attention.attn.o",
        "up": "intermediate.dense",
        "down": "output.dense",
        "attn": "attention.dropout",
        "ffn": "output.dropout",
        "stream": "output.LayerNorm",
    },
    outside={"embed": "word_embeddings"},
    enters={"attn": "attention", "ffn": "intermediate"},
)
