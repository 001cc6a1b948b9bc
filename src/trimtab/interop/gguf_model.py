"""A whole model as a GGUF file for llama.cpp: of Llama's architecture, with a byte-level BPE tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimtab.core.errors import UserError, listing
from trimtab.interop.gguf_lora import architecture, pairs_from_halves, spelled
from trimtab.models.gguf import INTERLEAVED

SUPPORTED = ("llama", "qwen2")
"""Architectures whose metadata is written here; llama.cpp's own converter knows them all."""
SPLITTERS = {"smollm": "smollm", "llama-3": "llama-bpe", "qwen2": "qwen2", "gpt2": "gpt-2"}
"""Part of a model's name or its type -> llama.cpp's word for how text is split before BPE."""


def write_gguf_model(model: nn.Module, tokenizer: Any, path: str | Path) -> int:
    """Write weights, metadata and tokenizer; returns how many tensors there are. Matrices in their own dtype.

    Errors: an architecture or a tokenizer that is not written here.
    """
    import gguf

    config: Any = model.config
    arch = architecture(config)
    if arch not in SUPPORTED:
        raise UserError(
            f"convert: a model of architecture {arch} is not written as GGUF here",
            fix="trimtab merge, then llama.cpp's convert_hf_to_gguf.py on the directory",
        )
    words = words_of(tokenizer)
    names = spelled(config, arch)
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    try:
        writer = gguf.GGUFWriter(str(partial), arch)
        add_sizes(writer, config)
        add_tokenizer(writer, tokenizer, words, config)
        count = add_tensors(writer, model, config, arch, names)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return count


def add_sizes(writer: Any, config: Any) -> None:
    """The architecture's numbers."""
    rotary = config.rope_parameters or {}
    writer.add_name(getattr(config, "_name_or_path", "") or "merged model")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    writer.add_rope_freq_base(float(rotary.get("rope_theta", 10000.0)))
    kind = rotary.get("rope_type", "default")
    if kind == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rotary["factor"]))
    elif kind != "default":
        raise UserError(f"convert: rotary positions of type {kind} are not written as GGUF here")
    writer.add_vocab_size(config.vocab_size)


def words_of(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer's own file, of a byte-level BPE."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    found: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
    if found.get("model", {}).get("type") != "BPE" or "ByteLevel" not in json.dumps(found.get("pre_tokenizer")):
        raise UserError(
            "convert: only byte-level BPE tokenizers are written as GGUF here",
            fix="trimtab merge, then llama.cpp's convert_hf_to_gguf.py on the directory",
        )
    return found


def splitter(config: Any, tokenizer: Any) -> str:
    """llama.cpp's word for how this tokenizer splits text."""
    told = f"{getattr(tokenizer, 'name_or_path', '')} {config._name_or_path} {config.model_type}".lower()
    return next((word for part, word in SPLITTERS.items() if part in told), "gpt-2")


def add_tokenizer(writer: Any, tokenizer: Any, words: dict[str, Any], config: Any) -> None:
    """Tokens, their kinds, merges and special ids."""
    import gguf

    by_id = {index: text for text, index in words["model"]["vocab"].items()}
    added = {one["id"]: one for one in words.get("added_tokens", [])}
    by_id |= {index: one["content"] for index, one in added.items()}
    texts, kinds = [], []
    for index in range(config.vocab_size):
        texts.append(by_id.get(index, f"[PAD{index}]"))
        control = index in added and added[index]["special"]
        kind = gguf.TokenType.CONTROL if control else gguf.TokenType.NORMAL
        kind = gguf.TokenType.USER_DEFINED if index in added and not control else kind
        kinds.append(gguf.TokenType.UNUSED if index not in by_id else kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter(config, tokenizer))
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    merges = words["model"]["merges"]
    writer.add_token_merges([" ".join(one) if isinstance(one, list) else one for one in merges])
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None:
            add(number)
    if getattr(tokenizer, "chat_template", None):
        writer.add_chat_template(tokenizer.chat_template)


def add_tensors(writer: Any, model: nn.Module, config: Any, arch: str, names: Any) -> int:
    """Every weight under its name there; the rows of q and k in llama.cpp's order where it pairs them."""
    import gguf

    seen: set[int] = set()
    unknown = []
    count = 0
    for name, value in model.named_parameters(remove_duplicate=False):
        if id(value) in seen and "lm_head" in name:
            continue
        seen.add(id(value))
        spelled_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if spelled_name is None:
            unknown.append(name)
            continue
        W = value.detach().cpu()
        if arch in INTERLEAVED and (".q_proj." in name or ".k_proj." in name):
            W = pairs_from_halves(W, config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads)
        narrow = W.dtype in (torch.bfloat16, torch.float16) and W.ndim > 1
        if narrow and W.dtype == torch.bfloat16:
            raw = W.contiguous().view(torch.uint16).numpy()
            writer.add_tensor(spelled_name, raw.view("uint8"), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(spelled_name, (W.contiguous() if narrow else W.float().contiguous()).numpy())
        count += 1
    if unknown:
        raise UserError(f"convert: GGUF has no tensor named for {listing(unknown)} of {arch}")
    return count
