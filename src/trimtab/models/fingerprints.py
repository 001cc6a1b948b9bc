"""A number that tells one base model from another."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimtab.core.errors import UserError
from trimtab.models.files import config_problems, header_of, refuse, weights_in
from trimtab.models.loading import Loaded

FULL_HASH_BYTES = 1 << 30
"""Weights up to this size in all are hashed whole for a fingerprint; bigger ones are sampled."""

SAMPLE_BYTES = 1 << 16

_INESSENTIAL = frozenset(
    "_name_or_path architectures auto_map bos_token_id dtype eos_token_id finetuning_task id2label label2id num_labels "
    "pad_token_id problem_type task_specific_params torch_dtype transformers_version use_cache".split()
)


def fingerprint(model: str | Path | Loaded | nn.Module) -> str:
    """A sha256 (64 hexadecimal digits) that tells one base model from another; it binds an adapter to its base.

    Of a directory (or a `Loaded`, which has one): over the fields of `config.json` that change what the model
    computes, and the weight files. Up to 1 GiB in all the files are hashed whole; beyond that each counts with its
    size, its header (every tensor's name, dtype, shape and place) and the first and last 64 KiB of every tensor, so
    a change in the middle of a big tensor alone goes unseen. Of a GGUF file likewise: all of it, or a thousand pieces
    of 64 KiB. Copies of a directory have equal fingerprints; other
    shards or another dtype of the same weights do not.

    Of a module: over its model type and the names, dtypes, shapes and content of its state dict, without attached
    deltas. It is a different number than that of the directory it was loaded from: compare like with like.
    Errors: `UserError` for a directory without config or safetensors weights.
    """
    if isinstance(model, Loaded):
        model = model.model if model.directory is None else model.directory
    if isinstance(model, nn.Module):
        return _module_fingerprint(model)
    directory = Path(model).expanduser()
    if directory.suffix == ".gguf" and directory.is_file():
        return _file_fingerprint(directory)
    if not directory.is_dir():
        raise UserError(f"model directory {directory} does not exist", fix="give the path of a directory")
    files, problems = weights_in(directory, "causal")
    refuse(f"model {directory}", [*config_problems(directory), *problems])
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    essential = {key: value for key, value in config.items() if key not in _INESSENTIAL}
    digest = hashlib.sha256(json.dumps(essential, sort_keys=True).encode())
    whole = sum(file.stat().st_size for file in files) <= FULL_HASH_BYTES
    for file in files:
        digest.update(f"\n{file.name} {file.stat().st_size}\n".encode())
        _hash_file(file, digest, whole=whole)
    return digest.hexdigest()


def _hash_file(file: Path, digest: Any, *, whole: bool) -> None:
    with file.open("rb") as opened:
        if whole:
            while block := opened.read(1 << 20):
                digest.update(block)
            return
        header, begin = header_of(file)
        digest.update(opened.read(begin))
        for entry in (value for name, value in sorted(header.items()) if name != "__metadata__"):
            first, last = entry["data_offsets"]
            for offset in (first, max(first, last - SAMPLE_BYTES)):
                opened.seek(begin + offset)
                digest.update(opened.read(min(SAMPLE_BYTES, last - offset)))


def _file_fingerprint(file: Path) -> str:
    """Of one file that is a whole model: all of it, or beyond 1 GiB pieces of 64 KiB, a thousand at even distances."""
    size = file.stat().st_size
    digest = hashlib.sha256(f"{size}".encode())
    with file.open("rb") as opened:
        if size <= FULL_HASH_BYTES:
            while block := opened.read(1 << 20):
                digest.update(block)
        for place in range(1000 if size > FULL_HASH_BYTES else 0):
            opened.seek((size - SAMPLE_BYTES) * place // 999)
            digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _module_fingerprint(model: nn.Module) -> str:
    kind = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    digest = hashlib.sha256(kind.encode())
    state = {key: value for key, value in model.state_dict().items() if "delta" not in key.split(".")}
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    whole = sum(value.nbytes for value in tensors.values()) <= FULL_HASH_BYTES
    for key, value in sorted(tensors.items()):
        digest.update(f"\n{key} {value.dtype} {tuple(value.shape)}\n".encode())
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        if whole or len(raw) <= 2 * SAMPLE_BYTES:
            digest.update(raw.data)
        else:
            digest.update(raw[:SAMPLE_BYTES].data)
            digest.update(raw[-SAMPLE_BYTES:].data)
    return digest.hexdigest()
