"""The two files of a PEFT adapter: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab.core.errors import UserError, listing
from trimtab.interop.peft.row import refuse
from trimtab.interop.peft.table import known_types

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX, ROOT = "base_model.model.", "base_model."


def is_peft(directory: str | Path) -> bool:
    """Whether a directory holds a PEFT adapter."""
    return (Path(directory) / CONFIG).is_file()


def read_config(directory: str | Path) -> dict[str, Any]:
    """The config of a PEFT directory, of a type that is read."""
    path = Path(directory) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"PEFT: {path} cannot be read: {error}") from None
    if not isinstance(config, dict) or "peft_type" not in config:
        raise UserError(f"PEFT: {path} names no peft_type")
    if config["peft_type"] not in known_types():
        raise refuse(
            f"peft_type {config['peft_type']}",
            f"there is no counterpart here; there is for {listing(known_types(), 40)}",
        )
    return config


def read_weights(directory: str | Path) -> dict[str, Tensor]:
    """The tensors of a PEFT directory."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(directory)
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / PICKLED).is_file():
            raise refuse(
                f"{folder / PICKLED}", "it is a pickle, which can run code when read", "save it again as safetensors"
            )
        raise UserError(f"PEFT: no {WEIGHTS} in {folder}")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"PEFT: {path} cannot be read: {error}") from None
