"""A model whose weights are read where they are needed, slice by slice, so that no process ever holds all of them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from trimtab.models.buffers import fill_buffers
from trimtab.models.context import lengthen
from trimtab.models.devices import DTYPES, auto_dtype
from trimtab.models.files import TASKS, check_directory, is_coded, weights_in
from trimtab.models.loading import Loaded
from trimtab.models.sources import config_of, located
from trimtab.models.starters import quiet_transformers
from trimtab.models.tasks import check_task
from trimtab.models.tokenizers import longest_input, set_padding, tokenizer_of


@dataclass(frozen=True)
class Slices:
    """The safetensors files of a model directory: any rows of any tensor, by name."""

    files: tuple[Path, ...]
    dtype: torch.dtype

    @cached_property
    def places(self) -> Mapping[str, Any]:
        """Name -> the open file that has it."""
        from safetensors import safe_open

        opened = [safe_open(file, framework="pt") for file in self.files]
        return {name: file for file in opened for name in file.keys()}  # noqa: SIM118

    def close(self) -> None:
        """Let go of the files, whose pages count as this process's memory."""
        self.__dict__.pop("places", None)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start:stop of a tensor; nothing else of it is read."""
        found: Tensor = self.places[name].get_slice(name)[start:stop]
        return found.to(self.dtype) if found.is_floating_point() else found


def hollow(
    source: str | Path, *, dtype: str, device: torch.device, context: int | None
) -> tuple[Loaded, Slices] | None:
    """A causal model with its tokenizer, its parameters on the meta device, and the files they are in.

    None where the weights have to be loaded in one piece: a model that is not in a local directory, whose tensors have
    other names in the files, or with buffers that its configuration does not give.
    """
    location, directory = located(source, None)
    if directory is None:
        return None
    check_directory(directory, task="causal")
    if is_coded(directory):
        return None
    files, _ = weights_in(directory, "causal")
    kind, note = (DTYPES[dtype], None) if dtype != "auto" else auto_dtype(device)
    slices = Slices(tuple(files), kind)
    with quiet_transformers():
        config = config_of(location, source, hub=False)
        check_task(config, source, "causal")
        notes = [note] if note else []
        if context is not None:
            notes.append(lengthen(config, context, str(source)))
        tokenizer = tokenizer_of(location, source)
        loader = getattr(importlib.import_module("transformers"), TASKS["causal"][0])
        with torch.device("meta"):
            model = loader.from_config(config, dtype=kind).eval()
        if not fill_buffers(model) or any(name not in slices.places for name, _ in model.named_parameters()):
            return None
        if any(tuple(slices.places[n].get_slice(n).get_shape()) != tuple(p.shape) for n, p in model.named_parameters()):
            return None
        notes += set_padding(model, tokenizer, source)
    length = longest_input(model, tokenizer)
    made = Loaded(model, tokenizer, str(source), directory, "causal", kind, device, length, (), tuple(notes))
    return made, slices


class Looks(TorchFunctionMode):
    """Within it, `seen` tells whether anything was asked of a tensor without memory but its shape and type."""

    seen = False
    PLAIN = ("shape", "dtype", "device", "ndim", "requires_grad", "grad_fn", "is_leaf", "layout", "_backward_hooks")
    CALLS = ("size", "dim", "numel", "is_floating_point", "requires_grad_", "__len__", "__hash__")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            hollow = any(isinstance(one, Tensor) and one.is_meta for one in (*args, *(kwargs or {}).values()))
        owner = getattr(getattr(func, "__self__", None), "__name__", "")
        self.seen |= hollow and owner not in self.PLAIN and getattr(func, "__name__", "") not in self.CALLS
        return func(*args, **(kwargs or {}))
