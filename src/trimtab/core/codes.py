"""The codes of a quantized model in a file: for formats whose codes cannot be made again from the weights alone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError, listing
from trimtab.core.quantized import describe, quantized_modules, rebuild

ABOUT = "trimtab"


def save_codes(model: nn.Module, path: str | Path, notes: Mapping[str, Any] | None = None) -> Path:
    """Write the codes of every quantized layer to one safetensors file, whole or not at all; returns its path.

    Keys are `<module>.<tensor>`; the header describes formats and shapes, holds `notes` (plain data), and a checksum.
    Errors: a model without codes, a place that cannot be written.
    """
    from safetensors.torch import save_file

    path = Path(path)
    tensors = tensors_of(model)
    if not tensors:
        raise UserError(f"save_codes: nothing in this {type(model).__name__} is quantized")
    held = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    about = {"quantized": describe(model), "notes": dict(notes or {}), "sha256": digest(held)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(held, temporary, {ABOUT: json.dumps(about)})
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except Exception as error:
        temporary.unlink(missing_ok=True)
        size = sum(value.nbytes for value in held.values())
        raise UserError(
            f"save_codes: could not write {size:,} bytes to {path}: {error}", fix="free some space"
        ) from None
    return path


def load_codes(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """Put the codes of a file in place of dense weights; returns the notes it was saved with.

    Errors, before anything changes: a file that is missing, damaged or of another kind; layers that the model does not
    have, that are quantized already or have another shape.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise UserError(f"load_codes: there is no file {path}")
    try:
        with safe_open(path, "pt") as opened:
            about = json.loads((opened.metadata() or {})[ABOUT])
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            description, expected = about["quantized"], about["sha256"]
    except (OSError, SafetensorError) as error:
        raise UserError(f"load_codes: {path} cannot be read: {error}") from None
    except (KeyError, ValueError, TypeError):
        raise UserError(f"load_codes: {path} was not written by save_codes") from None
    if digest(tensors) != expected:
        raise UserError(f"load_codes: {path} is damaged: its checksum is not the one in its header")
    rebuild(model, description)
    put(model, tensors, str(path), description)
    return dict(about["notes"])


def put(model: nn.Module, tensors: Mapping[str, Tensor], where: str, paths: Iterable[str]) -> None:
    """Fill the codes of some layers; `tensors` has theirs, under `<module>.<tensor>`, and no others."""
    wanted = {key: value for path in paths for key, value in tensors_of(model.get_submodule(path), f"{path}.").items()}
    odd = sorted(wanted.keys() ^ tensors.keys())
    odd += [key for key in wanted.keys() & tensors.keys() if wanted[key].shape != tensors[key].shape]
    odd += [key for key in wanted.keys() & tensors.keys() if wanted[key].dtype != tensors[key].dtype]
    if odd:
        raise UserError(f"load_codes: {where} does not hold what it describes: {listing(odd, 4)}")
    with torch.no_grad():
        for key, value in wanted.items():
            value.copy_(tensors[key])


def tensors_of(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """`<module>.<tensor>` -> encoded tensor of every quantized layer."""
    found: dict[str, Tensor] = {}
    for path, module in quantized_modules(model):
        code: Any = module._modules["code"]
        found |= {f"{prefix}{path}{'.' if path else ''}{name}": value for name, value in code.tensors().items()}
    return found


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and content."""
    found = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        found.update(f"\n{key} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
