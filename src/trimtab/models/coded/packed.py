"""Safetensors files with the codes of another tool, told by the `quantization_config` in config.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab.core.errors import UserError, listing
from trimtab.core.format import Format
from trimtab.models.coded.bitsandbytes import EightBits, FourBits
from trimtab.models.coded.gptq import BITS, GPTQWords
from trimtab.models.coded.source import Coded, Layout, Source
from trimtab.storage.absmax import Absmax
from trimtab.storage.affine import Affine
from trimtab.storage.dynamic8 import Dynamic8
from trimtab.storage.fp4 import FP4
from trimtab.storage.nf4 import NF4

KNOWN = "bitsandbytes (4-bit, int8) and gptq"
INSTEAD = {
    "awq": "quantize: {name: affine, code_bits: 4, group_size: 128}",
    "hqq": "quantize: hqq",
    "fp8": "quantize: absmax",
    "fbgemm_fp8": "quantize: absmax",
    "torchao": "quantize: {name: affine, code_bits: 4, group_size: 32}",
    "quanto": "quantize: {name: affine, code_bits: 4, group_size: 32}",
    "eetq": "quantize: absmax",
}
"""Method -> the format of ours that is nearest."""
PASSED_ON = ("mxfp4",)
"""Methods whose weights transformers itself makes dense while it loads them."""


def settings_of(config: Mapping[str, Any] | Any) -> dict[str, Any] | None:
    """The `quantization_config` of a config (a mapping or transformers'), None where there is none that is ours."""
    found = config.get("quantization_config") if isinstance(config, Mapping) else None
    if found is None and not isinstance(config, Mapping):
        found = getattr(config, "quantization_config", None)
    if hasattr(found, "to_dict"):
        found = found.to_dict()  # type: ignore[union-attr]
    if not found:
        return None
    if not isinstance(found, Mapping):
        raise UserError(f"`quantization_config` is {found!r}, not a mapping", fix="copy config.json again")
    return None if method_of(found) in PASSED_ON else dict(found)


def method_of(settings: Mapping[str, Any]) -> str:
    """The name of the method, which the oldest files of bitsandbytes leave out."""
    named = settings.get("quant_method")
    if named is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        return "bitsandbytes"
    return str(named).lower().rpartition(".")[2]


def layout_of(settings: Mapping[str, Any]) -> Layout:
    """How the weights of a `quantization_config` lie in the files. A `UserError` names what is not read."""
    method = method_of(settings)
    if method in ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"):
        eight = method.endswith("8bit") or bool(settings.get("load_in_8bit"))
        return EightBits() if eight else FourBits()
    if method == "gptq":
        return gptq_of(settings)
    instead = INSTEAD.get(method)
    raise UserError(
        f"its weights are quantized by {method!r}, which is not read; {KNOWN} are",
        fix="give the model as it was before, " + (f"with {instead}" if instead else "with a format of `quantize`"),
    )


def gptq_of(settings: Mapping[str, Any]) -> GPTQWords:
    """The layout of a GPTQ checkpoint."""
    bits, size = settings.get("bits"), settings.get("group_size", -1)
    if bits not in BITS or not isinstance(size, int) or isinstance(size, bool) or size == 0:
        raise UserError(
            f"`quantization_config` has bits {bits!r} and group_size {size!r}: GPTQ has 2, 3, 4 or 8 bits",
            fix="copy config.json again from where the model came from",
        )
    kind = settings.get("checkpoint_format") or "gptq"
    if kind not in ("gptq", "gptq_v2"):
        raise UserError(
            f"its checkpoint_format is {kind!r}, an order of words for one kernel; `gptq` and `gptq_v2` are read",
            fix="save the model in checkpoint_format gptq",
        )
    return GPTQWords(int(bits), size, shift=1 if kind == "gptq" else 0, mixed=bool(settings.get("dynamic")))


def usual_format(settings: Mapping[str, Any]) -> Format:
    """The format that most layers of such a model have, by its `quantization_config` alone."""
    layout = layout_of(settings)
    if isinstance(layout, GPTQWords):
        return Affine(layout.bits, layout.group_size if layout.group_size > 0 else None)
    if isinstance(layout, EightBits):
        return Absmax()
    scale = Dynamic8(256, center=True, grid=65536) if settings.get("bnb_4bit_use_double_quant") else None
    return (NF4 if settings.get("bnb_4bit_quant_type", "fp4") == "nf4" else FP4)(64, scale)


class Packed(Source):
    """The files of a model directory, some of whose layers are in codes."""

    def __init__(self, settings: Mapping[str, Any], files: Sequence[Path]) -> None:
        self.layout = layout_of(settings)
        self.kind, self.files = self.layout.name, files

    @cached_property
    def places(self) -> Mapping[str, Any]:
        """Name -> the open file that has it."""
        from safetensors import safe_open

        opened = [safe_open(file, framework="pt") for file in self.files]
        return {name: file for file in opened for name in file.keys()}  # noqa: SIM118

    @cached_property
    def layers(self) -> frozenset[str]:
        return frozenset(path for name in self.places if (path := self.marked(name)) is not None)

    def marked(self, name: str) -> str | None:
        """The layer whose code a tensor belongs to, by its name alone."""
        for end in self.layout.marks:
            if name.endswith(f".{end}"):
                return name.removesuffix(f".{end}")
        return None

    def names(self) -> frozenset[str]:
        return frozenset(
            name
            for name in self.places
            if self.marked(name) is None
            and not (name.endswith(".weight") and name.removesuffix(".weight") in self.layers)
        )

    def dense(self, name: str) -> Tensor:
        found: Tensor = self.places[name].get_tensor(name)
        return found

    def paths(self) -> frozenset[str]:
        return self.layers

    def get(self, path: str, end: str) -> Tensor | None:
        name = f"{path}.{end}"
        return self.dense(name) if name in self.places else None

    def format(self, path: str) -> tuple[Format, tuple[int, int]]:
        return self.layout.format(lambda end: self.get(path, end))

    def read(self, path: str) -> Coded:
        return self.layout.read(lambda end: self.get(path, end))

    def damage(self) -> list[tuple[str, str]]:
        """What keeps layers from being read, from their small tensors: (what, fix) of the first few."""
        if not self.layers:
            marks = listing([f"*.{end}" for end in self.layout.marks], 3)
            return [(f"config.json says {self.kind}, but the files hold no {marks}", "the right config.json")]
        return list(problems(self, sorted(self.layers)))


def problems(source: Source, paths: Iterable[str]) -> Iterable[tuple[str, str]]:
    """What is wrong with the formats of layers, each with its fix."""
    for path in paths:
        try:
            source.format(path)
        except UserError as error:
            yield f"{path}: {error.message}", error.fix or "copy the file again from where the model came from"
