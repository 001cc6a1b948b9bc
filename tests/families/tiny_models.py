"""Tiny random models of every family, from the config classes of the installed transformers, and inputs for them."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import transformers
from torch import nn

from trimtab.core.family import tables

logging.getLogger("transformers").setLevel(logging.ERROR)

WIDE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**WIDE, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32}
DECODER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MIXTURE = {**DECODER, "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
MIXTURE |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
MIXTURE |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}
VISION = {"hidden_size": 32, "output_channels": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32}
VISION |= {"patch_size": 8, "mlp_dim": 48, "num_pos_feats": 12, "global_attn_indexes": [1], "window_size": 2}
MASKS = {"hidden_size": 24, "mlp_dim": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "iou_head_hidden_dim": 16}
MASKS |= {"vit_dim": 32}
PROMPTS = {"hidden_size": 24, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}
T5_DEPTH = {"num_layers": 2, "num_decoder_layers": 3}
SIZES: dict[str, dict[str, Any]] = {
    "llama": DECODER,
    "gemma": DECODER,
    "phi3": DECODER,
    "gpt_oss": MIXTURE,
    "mixtral": MIXTURE,
    "bert": {**WIDE, "max_position_embeddings": 40, "pad_token_id": 0},
    "deberta": {**WIDE, "max_position_embeddings": 40, "pad_token_id": 0},
    "mpnet": {**WIDE, "max_position_embeddings": 40},
    "distilbert": {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "t5": {
        "vocab_size": 64,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "num_heads": 4,
    },
    "neox": WIDE,
    "bloom": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "vit": {**WIDE, "image_size": 16, "patch_size": 8},
    "sam": {"vision_config": VISION, "prompt_encoder_config": PROMPTS, "mask_decoder_config": MASKS},
}


HEADS = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
WITH_A_HEAD = [name for name in tables() if name in HEADS]
"""Model types that can be language models, those that read both ways too."""
BOTH_WAYS = ("bert", "roberta")
CAUSAL = [name for name in WITH_A_HEAD if tables()[name].name not in BOTH_WAYS]


def config(model_type: str, **changes: Any) -> Any:
    family = tables()[model_type].name
    size = dict(VISION if model_type.endswith("vision_model") else SIZES[family])
    if model_type == "bloom":
        size = {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    if model_type in ("qwen2_moe", "qwen3_moe"):
        size["mlp_only_layers"] = [0]
    return transformers.AutoConfig.for_model(model_type, **size, **changes)


def build(model_type: str, head: str = "AutoModel", **changes: Any) -> nn.Module:
    """A model in eval mode. All weights are drawn at random, those that start at zero or one too."""
    return scramble(getattr(transformers, head).from_config(config(model_type, **changes)))


@functools.cache
def outline(model_type: str, head: str = "AutoModel", **changes: Any) -> nn.Module:
    """The same model without any data, shared by all tests that only look at names."""
    with torch.device("meta"):
        return getattr(transformers, head).from_config(config(model_type, **changes))


def scramble(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (0.5 if parameter.ndim > 1 else 1.0)
    return model.eval()


@torch.no_grad()
def run(model: nn.Module) -> Any:
    """One forward pass with inputs that suit the model."""
    model_type = model.config.model_type
    family = tables()[model_type].name
    ids = torch.arange(3, 9).view(1, 6)
    if family == "vit":
        return model(pixel_values=torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16))
    if family == "sam":
        pixels = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
        if model_type.endswith("vision_model"):
            return model(pixel_values=pixels)
        return model(pixel_values=pixels, input_points=torch.tensor([[[[5.0, 9.0]]]]))
    if family == "t5":
        return model(input_ids=ids, decoder_input_ids=ids[:, :4])
    return model(input_ids=ids)
