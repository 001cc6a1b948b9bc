"""GGUF files: the weights of llama.cpp's format, dequantized and under transformers' names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.core.errors import UserError, listing

if TYPE_CHECKING:
    import torch

INTERLEAVED = ("llama", "mistral3", "granite", "smollm3", "arcee", "olmo")
"""Architectures whose files pair the rows of q and k for llama.cpp's rotary positions: (0, 1), (2, 3), ..."""
PARTED = ("gptneox", "bloom", "falcon")
"""Architectures with q, then k, then v in one weight of a file, where transformers has them head by head."""


def read_weights(path: Path, names: list[str], config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, float32 weight) for every one of transformers' parameter `names` that the GGUF file at `path` holds.

    `config` is the model's config: its layer count names the blocks, its head counts undo the order in which llama.cpp
    keeps the rows of q and k. A name the file has under no other spelling is left out (a tied output matrix); a tensor
    that answers to no name is a `UserError` with all such tensors, except llama.cpp's own rotary tables.
    """
    import gguf
    import torch

    reader = gguf.GGUFReader(path)
    architecture = str(reader.fields["general.architecture"].contents())
    known = {text: arch for arch, text in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise UserError(f"{path.name} has architecture {architecture!r}, which the package gguf does not know")
    spelled = gguf.get_tensor_name_map(known[architecture], config.num_hidden_layers)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    read = set()
    for name in names:
        here = spelled.get_name(name, try_suffixes=(".weight", ".bias"))
        if here not in tensors:
            continue
        read.add(here)
        weight = torch.from_numpy(gguf.dequantize(tensors[here].data, tensors[here].tensor_type).copy()).float()
        if architecture in INTERLEAVED and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            weight = halves_from_pairs(weight, heads)
        yield name, weight
    if left := sorted(name for name in tensors.keys() - read if not name.startswith("rope_freqs")):
        raise UserError(
            f"{path.name} holds tensors that no parameter of a {config.model_type} model takes: {listing(left)}"
        )


def halves_from_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from the order (0, d/2, 1, d/2 + 1, ...) of llama.cpp back to (0, 1, ..., d - 1)."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)
