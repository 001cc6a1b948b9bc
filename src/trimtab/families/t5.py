"""T5: encoder and decoder, pre-norm; each sub-layer ends in a dropout. A block returns a tuple.

`q` is self-attention in both stacks, `cross.q` the decoder's attention to the encoder. The encoder and the decoder
look tokens up in modules of their own, which share one weight with `shared`; `embed` is those that are called.
"""

from __future__ import annotations

from trimtab.core.family import Family

FAMILY = Family(
    name="t5",
    model_types=("t5", "mt5", "umt5"),
    blocks={"encoder.block": "encoder", "decoder.block": "decoder"},
    roles={
        "q": "layer.0.SelfAttention.q",
        "k": "layer.0.SelfAttention.k",
        "v": "layer.0.SelfAttention.v",
        "o": "layer.0.SelfAttention.o",
        "gate": "layer.*.DenseReluDense.wi_0",
        "up": ("layer.*.DenseReluDense.wi", "layer.*.DenseReluDense.wi_1"),
        "down": "layer.*.DenseReluDense.wo",
        "attn": "layer.0.dropout",
        "ffn": ("encoder/layer.1.dropout", "decoder/layer.2.dropout"),
        "cross.q": "layer.1.EncDecAttention.q",
        "cross.k": "layer.1.EncDecAttention.k",
        "cross.v": "layer.1.EncDecAttention.v",
        "cross.o": "layer.1.EncDecAttention.o",
        "cross.attn": "decoder/layer.1.dropout",
    },
    outside={"embed": ("encoder.embed_tokens", "decoder.embed_tokens")},
    enters={
        "attn": "layer.0.layer_norm",
        "cross.attn": "decoder/layer.1.layer_norm",
        "ffn": ("encoder/layer.1.layer_norm", "decoder/layer.2.layer_norm"),
    },
)
