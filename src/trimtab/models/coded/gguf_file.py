"""A GGUF file as a frozen base: the codes of its linear layers are kept, everything else is decoded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError, listing
from trimtab.core.format import Format
from trimtab.models.coded.gguf_blocks import coded, format_of
from trimtab.models.coded.source import Coded, Source
from trimtab.models.gguf import INTERLEAVED, halves_from_pairs

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Those whose tensors are transformers', but for names and the order of rows."""
DENSE = ("F32", "F16", "BF16", "F64")


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, by its name."""
    return path.suffix == ".gguf" and path.is_file()


def problems_of(path: Path) -> list[tuple[str, str]]:
    """What keeps a GGUF file from being opened, each with its fix."""
    import importlib.util

    if importlib.util.find_spec("gguf") is None:
        return [("the package gguf, which reads it, is not installed", "pip install gguf")]
    with open(path, "rb") as stream:
        if stream.read(4) != b"GGUF":
            return [("it is no GGUF file, or a damaged one", "copy the file again from where the model came from")]
    return []


class GGUFFile(Source):
    """The tensors of a file under the names that a model has for them."""

    def __init__(self, path: Path, config: Any, model: nn.Module) -> None:
        import gguf

        try:
            reader = gguf.GGUFReader(path)
            self.architecture = str(reader.fields["general.architecture"].contents())
        except (ValueError, KeyError, OSError, IndexError) as error:
            raise UserError(
                f"the file cannot be read: {error or type(error).__name__}",
                fix="copy the file again from where the model came from",
            ) from None
        if self.architecture not in ARCHITECTURES:
            raise UserError(
                f"codes of a {self.architecture} file are not kept; of {listing(ARCHITECTURES)} they are",
                fix="decode it once with transformers (from_pretrained gguf_file=...) and save that",
            )
        self.kind, self.config = f"GGUF {path.name}", config
        known = {text: arch for arch, text in gguf.MODEL_ARCH_NAMES.items()}[self.architecture]
        spelled = gguf.get_tensor_name_map(known, config.num_hidden_layers)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        ours = {name: spelled.get_name(name, try_suffixes=(".weight", ".bias")) for name, _ in model.named_parameters()}
        self.tensors = {name: tensors[here] for name, here in ours.items() if here in tensors}
        read = {tensor.name for tensor in self.tensors.values()}
        if left := sorted(name for name in tensors.keys() - read if not name.startswith("rope_freqs")):
            raise UserError(
                f"the file holds tensors that no parameter of a {config.model_type} model takes: {listing(left)}",
                fix="decode it once with transformers (from_pretrained gguf_file=...) and save that",
            )
        linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        self.layers = {
            name.removesuffix(".weight")
            for name, tensor in self.tensors.items()
            if name.removesuffix(".weight") in linear and format_of(tensor.tensor_type.name) is not None
        }

    def names(self) -> frozenset[str]:
        return frozenset(name for name in self.tensors if name.removesuffix(".weight") not in self.layers)

    def dense(self, name: str) -> Tensor:
        import gguf

        tensor = self.tensors[name]
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise UserError(
                f"{name} is of type {tensor.tensor_type.name}, which is not read", fix="a Q4_K, Q6_K or Q8_0 file"
            ) from None
        return self.arrange(name)(torch.from_numpy(values.copy()).float())

    def paths(self) -> frozenset[str]:
        return frozenset(self.layers)

    def format(self, path: str) -> tuple[Format, tuple[int, int]]:
        tensor = self.tensors[f"{path}.weight"]
        format = format_of(tensor.tensor_type.name)
        assert format is not None
        into, out = (int(size) for size in tensor.shape)
        return format, (out, into)

    def read(self, path: str) -> Coded:
        name = f"{path}.weight"
        tensor, (_, shape) = self.tensors[name], self.format(path)
        raw = torch.from_numpy(tensor.data.copy())
        return coded(tensor.tensor_type.name, raw, shape, self.arrange(name))

    def arrange(self, name: str) -> Callable[[Tensor], Tensor]:
        """From the file's order of rows to transformers'."""
        if self.architecture in INTERLEAVED and (".q_proj." in name or ".k_proj." in name):
            heads = self.config.num_attention_heads if ".q_proj." in name else self.config.num_key_value_heads
            return partial(halves_from_pairs, heads=heads)
        return lambda values: values

    def notes(self) -> list[str]:
        kinds: dict[str, int] = {}
        for name in self.names():
            kind = self.tensors[name].tensor_type.name
            if kind not in DENSE:
                kinds[kind] = kinds.get(kind, 0) + 1
        if not kinds:
            return []
        told = listing([f"{count} of {kind}" for kind, count in kinds.items()])
        return [f"decoded, being no linear layers or of a type without a format of ours: {told}"]
