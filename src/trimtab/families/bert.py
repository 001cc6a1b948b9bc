"""BERT and its descendants: post-norm; a sub-layer's last dropout comes before the addition and the norm after it."""

from __future__ import annotations

from trimtab.core.family import Family

FAMILY = Family(
    name="bert",
    model_types=("bert", "roberta", "camembert", "xlm-roberta", "electra", "ernie", "data2vec-text", "megatron-bert"),
    blocks={"encoder.layer": None},
    roles={
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "up": "intermediate.dense",
        "down": "output.dense",
        "attn": "attention.output.dropout",
        "ffn": "output.dropout",
        "stream": "output.LayerNorm",
        "cross.q": "crossattention.self.query",
        "cross.k": "crossattention.self.key",
        "cross.v": "crossattention.self.value",
        "cross.o": "crossattention.output.dense",
        "cross.attn": "crossattention.output.dropout",
    },
    outside={"embed": "word_embeddings"},
    enters={"attn": ("attention.ln", "attention"), "ffn": ("ln", "intermediate")},
)
