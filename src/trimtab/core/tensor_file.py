"""Tensors written to a safetensors file without a second copy of them in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import UserError

DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"},
    **{torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL"},
    **{torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64"},
}
"""The names of floating and whole types in a safetensors header."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file, one tensor after the other, and return its sha256 as 64 hexadecimal digits.

    A tensor on another device, or one that is not contiguous, is copied for as long as it is being written; nothing
    else is held twice. Two names for one piece of memory are written twice. Errors: a type the format has no name for;
    OSError from the system.
    """
    strange = sorted({str(one.dtype) for one in tensors.values() if one.dtype not in DTYPES})
    if strange:
        raise UserError(f"save: a safetensors file cannot hold {', '.join(strange)}", fix="a type such as float32")
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # every tensor starts aligned
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as out:
        for block in (len(text).to_bytes(8, "little"), text):
            out.write(block)
            digest.update(block)
        for name in order:
            values = tensors[name].detach().cpu().contiguous().reshape(-1)
            if values.numel():
                view: Any = values.view(torch.uint8).numpy()
                out.write(view)
                digest.update(view)
    return digest.hexdigest()
