"""DistilBERT: post-norm; no dropout behind the attention's output projection, one inside the feed-forward module."""

from __future__ import annotations

from trimtab.core.family import Family

FAMILY = Family(
    name="distilbert",
    model_types=("distilbert",),
    blocks={"transformer.layer": None},
    roles={
        "q": "attention.q_lin",
        "k": "attention.k_lin",
        "v": "attention.v_lin",
        "o": "attention.out_lin",
        "up": "ffn.lin1",
        "down": "ffn.lin2",
        "attn": "attention.out_lin",
        "ffn": "ffn",
        "stream": "output_layer_norm",
    },
    outside={"embed": "word_embeddings"},
    enters={"attn": "attention", "ffn": "ffn"},
)
