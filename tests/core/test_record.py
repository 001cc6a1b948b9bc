"""The record of a saved adapter says where every site is, the first layer included."""

from __future__ import annotations

from transformers import LlamaConfig, LlamaForCausalLM

import trimtab as tt
from trimtab.core.save import describe
from trimtab.core.state import require_state


def test_every_site_of_a_layer_carries_its_number_the_first_one_too() -> None:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = tt.attach(LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=2, **shape)), tt.LoRA(rank=2))
    sites = describe(model, require_state(model, "record").adapters["default"])["parts"][0]["sites"]
    layers = [site.get("layer") for site in sites]
    assert layers.count(0) == layers.count(1) == len(sites) // 2 > 0
