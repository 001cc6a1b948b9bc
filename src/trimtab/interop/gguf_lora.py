"""A plain LoRA as a GGUF file for llama.cpp and Ollama, and back.

llama.cpp adds alpha / rank · B A to the weight of the same name, so a file holds one alpha, and factors under
`<tensor>.lora_a` (rank, in) and `<tensor>.lora_b` (out, rank); the A of an embedding is looked up by row and stands
transposed. Rows are in llama.cpp's order: pairs in q and k, q before k before v in one weight, by architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError, listing
from trimtab.core.merge import tied_parameters
from trimtab.core.places import by_head
from trimtab.core.rows import Rows
from trimtab.interop.peft.lora import is_lora, pairs_of, stacked
from trimtab.interop.saved import Saved
from trimtab.models.gguf import INTERLEAVED, PARTED, halves_from_pairs

ARCHITECTURES = {"smollm3": "smollm3", "phi3": "phi3", "gpt2": "gpt2", "gpt_neox": "gptneox"}
"""Model types whose name in GGUF cannot be read off."""


def architecture(config: Any) -> str:
    """llama.cpp's name of a model's architecture."""
    import gguf

    kind = config.get_text_config().model_type
    name = ARCHITECTURES.get(kind, kind)
    name = "llama" if name in ("mistral", "mixtral") else name
    known = set(gguf.MODEL_ARCH_NAMES.values())
    if name not in known:
        raise UserError(f"convert: llama.cpp has no architecture for {kind!r}", fix="trimtab convert --to peft")
    return name


def pairs_from_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from (0, 1, ..., d − 1) to llama.cpp's order (0, d/2, 1, d/2 + 1, ...)."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def heads_of(weight: Tensor, config: Any) -> list[Rows]:
    """The rows of q, of k and of v in a weight that has them head by head."""
    found = list(by_head(weight.shape[0], config).values())
    if not found:
        raise UserError(
            f"convert: {weight.shape[0]} rows of q, k and v do not divide into the heads of this {config.model_type}",
            fix="see whether the adapter and config.json are of the same model",
        )
    return found


def parts_from_heads(weight: Tensor, config: Any) -> Tensor:
    """Rows of one weight from head by head to all queries, all keys, all values."""
    return torch.cat([rows.of(weight, 0) for rows in heads_of(weight, config)])


def heads_from_parts(weight: Tensor, config: Any) -> Tensor:
    """And back."""
    found, done = heads_of(weight, config), torch.empty_like(weight)
    for rows, part in zip(found, weight.split([len(rows) for rows in found]), strict=True):
        done = rows.put(done, part, 0)
    return done


def spelled(config: Any, arch: str) -> Any:
    """The package's map from names of transformers to those of GGUF."""
    import gguf

    key = next(one for one, text in gguf.MODEL_ARCH_NAMES.items() if text == arch)
    return gguf.get_tensor_name_map(key, config.get_text_config().num_hidden_layers)


def factors(model: nn.Module, saved: Saved) -> dict[str, tuple[Tensor, Tensor]]:
    """Module path -> B (out, rank) and A (rank, in), every scale in B."""
    others = [type(part.method).__name__ for part in saved.parts if not is_lora(part.method)]
    if others or any(hasattr(part.method, "inner") for part in saved.parts):
        raise UserError(
            f"convert: llama.cpp takes plain LoRA, and this is {listing(others or ['DoRA'])}",
            fix="trimtab convert ADAPTER --to lora first, or merge it and export the model",
        )
    found: dict[str, list[Any]] = {}
    for part in saved.parts:
        for pair in pairs_of(part, 1.0):
            if pair.A.ndim != 2 or pair.site.place.parameter is not None:
                raise UserError(f"convert: llama.cpp has no LoRA for {pair.site.place.name}, a stack of experts")
            found.setdefault(pair.site.place.module, []).append(pair)
    done = {}
    for path, pairs in found.items():
        module: Any = model.get_submodule(path)
        out = module.embedding_dim if isinstance(module, nn.Embedding) else int(getattr(module, "nf", 0))
        out = out or module.out_features
        whole = pairs[0] if len(pairs) == 1 and pairs[0].site.place.rows is None else stacked(pairs, out, 1.0)
        done[path] = (whole.B * (whole.alpha / whole.A.shape[0]), whole.A)
    return done


def write_gguf_lora(model: nn.Module, saved: Saved, path: str | Path) -> list[str]:
    """Write a LoRA for llama.cpp; returns the names of its tensors."""
    import gguf

    config: Any = model.config
    arch = architecture(config)
    names = spelled(config, arch)
    text: Any = config.get_text_config()
    ranks = {A.shape[0] for _, A in factors(model, saved).values()}
    tensors: dict[str, Tensor] = {}
    problems = []
    tied = tied_parameters(model)
    for module, (B, A) in factors(model, saved).items():
        if id(model.get_submodule(module)._parameters.get("weight")) in tied:
            raise UserError(
                f"convert: {module} shares its weight, and llama.cpp adds a LoRA on it to embedding and output alike",
                fix="--to gguf-model writes the merged model",
            )
        name = names.get_name(f"{module}.weight", try_suffixes=(".weight", ".bias"))
        if name is None:
            problems.append(module)
            continue
        B = B * A.shape[0]  # one alpha of 1 for all: the file is scaled by 1 / rank
        if arch in INTERLEAVED and module.endswith((".q_proj", ".k_proj")):
            query = module.endswith(".q_proj")
            B = pairs_from_halves(B, text.num_attention_heads if query else text.num_key_value_heads)
        if arch in PARTED and module.endswith(".query_key_value"):
            B = parts_from_heads(B, text)
        embedding = isinstance(model.get_submodule(module), nn.Embedding)
        tensors[f"{name}.lora_a"] = A.mT if embedding else A
        tensors[f"{name}.lora_b"] = B
    if problems:
        raise UserError(f"convert: GGUF has no tensor named for {listing(problems)} of {arch}")
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    try:
        writer = gguf.GGUFWriter(str(partial), arch)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 1.0)
        writer.add_name(f"rank {max(ranks)} adapter")
        for name, value in tensors.items():
            writer.add_tensor(name, value.detach().float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return sorted(tensors)


def read_gguf_lora(path: str | Path, config: Any) -> dict[str, Tensor]:
    """The change of every weight that a GGUF LoRA makes, by GGUF's name and in transformers' order of rows."""
    import gguf

    reader = gguf.GGUFReader(str(path))
    arch = str(reader.fields["general.architecture"].contents())
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    held: Mapping[str, Tensor] = {one.name: torch.from_numpy(one.data.copy()) for one in reader.tensors}
    text = config.get_text_config()
    found = {}
    for name in held:
        if name.endswith(".lora_a"):
            stem = name.removesuffix(".lora_a")
            A, B = held[name], held[f"{stem}.lora_b"]
            A = A.mT if stem.startswith("token_embd") else A
            change = (alpha / B.shape[1]) * B @ A
            if arch in INTERLEAVED and (".attn_q." in stem or ".attn_k." in stem):
                heads = text.num_attention_heads if ".attn_q." in stem else text.num_key_value_heads
                change = halves_from_pairs(change, heads)
            if arch in PARTED and ".attn_qkv" in stem:
                change = heads_from_parts(change, text)
            found[stem] = change
    return found
