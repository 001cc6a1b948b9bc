"""Merging shard by shard: a checkpoint is copied, and each edited tensor is replaced on the way, one at a time.

A safetensors file is a header and the bytes of its tensors. Merging changes no name, shape or dtype, so the header
stays and the rest is written from front to back. The model is never built: what is in memory is one tensor, its edited
copy in fp32, and the adapter.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from trimtab.core.delta import Cast, Delta, Group
from trimtab.core.errors import UserError, listing
from trimtab.core.hosts import RawWeight
from trimtab.core.merge import tied_parameters
from trimtab.core.places import Place
from trimtab.core.raw import edit_raw
from trimtab.core.rows import Rows
from trimtab.core.site import is_conv1d
from trimtab.interop.saved import Saved, SavedPart, SavedSite

CHUNK = 1 << 24
"""Bytes that are copied at once."""
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@dataclass(frozen=True)
class Edit:
    """What changes one tensor of a checkpoint: the deltas on it in order, and how it is laid out."""

    layout: RawWeight
    deltas: tuple[Delta, ...]
    is_bias: bool


def files_of(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those of its index, or the only one."""
    index = directory / INDEX
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [directory / name for name in dict.fromkeys(names)]
    return [one for one in (directory / "model.safetensors",) if one.is_file()]


def header_of(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its tensors begin."""
    with open(path, "rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    return header, 8 + size


def why_not(model: nn.Module, saved: Saved, directory: Path | None) -> str | None:
    """Why a checkpoint cannot be merged shard by shard; None if it can. `model` is its outline."""
    files = files_of(directory) if directory is not None else []
    if not files:
        return "it has no safetensors files"
    names = {name for path in files for name in header_of(path)[0]}
    tied = tied_parameters(model)
    own = {name: value for name, value in model.named_parameters(remove_duplicate=False)}
    missing = [name for name, value in own.items() if name not in names and id(value) not in tied]
    unknown = [name for name in names if name not in own and name not in dict(model.named_buffers())]
    if missing or unknown:
        return f"its tensors have other names than the model's ({listing([*missing, *unknown], 2)})"
    edited = {key.rpartition(".")[0] for key in edits_of(model, saved)}
    for path in edited:
        if any(id(value) in tied for value in model.get_submodule(path)._parameters.values() if value is not None):
            return f"{path} shares its weight, which merging parts"
    if any(part.encoded for part in saved.parts):
        return "the adapter was started on quantized weights"
    return None


def edits_of(model: nn.Module, saved: Saved) -> dict[str, Edit]:
    """Name of a tensor -> what changes it."""
    found: dict[str, tuple[RawWeight, list[Delta]]] = {}
    for part in saved.parts:
        shared = Group(nested(part.shared)) if part.shared else None
        for site in part.sites:
            layout = layout_of(model.get_submodule(site.place.module), site.place)
            delta = delta_of(part, site, shared)
            key = f"{site.place.module}.{layout.name}"
            found.setdefault(key, (layout, []))[1].append(delta)
    edits = {}
    for key, (layout, deltas) in found.items():
        edits[key] = Edit(layout, tuple(deltas), False)
        name = f"{key.rpartition('.')[0]}.{layout.bias_name}"
        edits[name] = Edit(layout, tuple(deltas), True)
    return edits


def nested(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Tensors by dotted name as nested dicts."""
    done: dict[str, Any] = {}
    for key, value in tensors.items():
        *path, last = key.split(".")
        inner = done
        for name in path:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return done


def delta_of(part: SavedPart, site: SavedSite, shared: Group | None) -> Delta:
    """A delta that is attached to nothing."""
    delta = Delta(part.method, nested(site.tensors), adapter="", slot="", rows=site.place.rows)
    delta.share(shared)
    return delta.eval()


def layout_of(module: nn.Module, place: Place) -> RawWeight:
    """How the tensor of a place lies in the checkpoint."""
    if place.parameter is not None:
        raw = module._parameters[place.parameter]
        kind = "experts" if raw is not None and raw.ndim == 3 else "matrix"
        return RawWeight(place.parameter, kind, place.transposed)
    kind = {"norm": "vector", "conv": "conv"}.get(place.kind, "matrix")
    return RawWeight("weight", kind, is_conv1d(module) or isinstance(module, nn.Embedding))


def refuse(model: nn.Module, saved: Saved) -> None:
    """Refuse what has no place in a plain model."""
    problems = []
    for part in saved.parts:
        if not part.method.mergeable:
            reason = part.method.laws.get("merge", "it has no weight of its own")
            problems.append(f"{type(part.method).__name__} cannot be merged: {reason}")
    if problems:
        raise UserError(f"merge: {listing(problems)}", fix="keep it as an adapter")
    for key, edit in edits_of(model, saved).items():
        path, _, name = key.rpartition(".")
        if edit.is_bias and model.get_submodule(path)._parameters.get(name) is None:
            added = [d for d in edit.deltas if d.method.bias(None, Cast(d, torch.float32)) is not None]  # type: ignore[attr-defined]
            problems += [f"{path} has no bias, and the adapter adds one" for _ in added[:1]]
    if problems:
        raise UserError(
            f"merge: {listing(problems, 3)}: a plain model of this kind has no room for it", fix="keep it as an adapter"
        )


@torch.no_grad()
def edited(edit: Edit, stored: Tensor) -> Tensor:
    """A tensor of the checkpoint with its deltas applied, in fp32 at least and rounded once."""
    wide = stored.float() if stored.element_size() < 4 else stored
    if edit.is_bias:
        for delta in edit.deltas:
            method: Any = delta.method
            rows = delta.rows or Rows(0, wide.shape[0])
            wide = rows.put(wide, method.bias(rows.of(wide), Cast(delta, wide.dtype)))
        return wide.to(stored.dtype)
    W = edit.layout.canonical(wide)
    for delta in edit.deltas:
        W, _ = edit_raw(delta, W, None, edit.layout)
    return edit.layout.stored(W, stored).to(stored.dtype).contiguous()


def merge_shards(model: nn.Module, saved: Saved, source: Path, target: Path) -> int:
    """Write the merged checkpoint beside nothing else in `target`; returns how many tensors were changed."""
    refuse(model, saved)
    edits = edits_of(model, saved)
    done = 0
    for path in files_of(source):
        done += merge_file(path, target / path.name, edits)
    if (source / INDEX).is_file():
        shutil.copyfile(source / INDEX, target / INDEX)
    return done


def merge_file(source: Path, target: Path, edits: Mapping[str, Edit]) -> int:
    """Copy one file, replacing the tensors that are edited."""
    header, start = header_of(source)
    order = sorted(header, key=lambda name: header[name]["data_offsets"][0])
    done = 0
    with open(source, "rb") as read, open(target, "wb") as write:
        write.write(read.read(start))
        for name in order:
            begin, end = header[name]["data_offsets"]
            read.seek(start + begin)
            if name not in edits:
                copy(read, write, end - begin)
                continue
            kind = DTYPES.get(header[name]["dtype"])
            if kind is None:
                raise UserError(f"merge: {name} is stored as {header[name]['dtype']}, which is not merged into")
            stored = torch.frombuffer(bytearray(read.read(end - begin)), dtype=kind).reshape(header[name]["shape"])
            write.write(bytes_of(edited(edits[name], stored)))
            del stored  # before the next one is read
            done += 1
    return done


def bytes_of(value: Tensor) -> Any:
    """The bytes of a tensor without a copy of them."""
    array: Any = value.contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(array)


def copy(read: BinaryIO, write: BinaryIO, size: int) -> None:
    while size:
        piece = read.read(min(CHUNK, size))
        if not piece:
            raise UserError("merge: the base model's file ends too early", fix="fetch it again")
        write.write(piece)
        size -= len(piece)
