"""Where a model is: a directory, a GGUF file, a starter's short name or a hub id; and its configuration."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimtab.core.errors import UserError, listing, nearest
from trimtab.models.files import first_line
from trimtab.models.starters import fetch, starters

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def located(source: str | Path, progress: Callable[[str], None] | None) -> tuple[str, Path | None]:
    """What transformers is given, and the directory if it is one already here (`None`: a hub id)."""
    path = Path(source).expanduser()
    text = str(source)
    if text and path.is_dir():
        return str(path), path
    if path.is_file() and path.suffix == ".gguf":
        return str(path), path
    if path.is_file():
        raise UserError(
            f"model {text} is a file; a model is a directory, or a GGUF file",
            fix=f"give a directory, {_names_of_starters()}",
        )
    if text in starters():
        directory = fetch(text, progress=progress)
        return str(directory), directory
    looks_local = text.startswith((".", "~")) or text.count("/") > 1 or "\\" in text
    if isinstance(source, Path) or path.is_absolute() or looks_local:
        raise UserError(
            f"model directory {text} does not exist", fix=f"give the path of a directory, {_names_of_starters()}"
        )
    if not _HUB_ID.fullmatch(text):
        raise UserError(
            f"model {text!r} is neither a directory, nor a starter, nor in the form of a hub id (owner/name)",
            fix=f"give the path of a directory, {_names_of_starters()}",
        )
    return text, None


def _names_of_starters() -> str:
    return f"or one of the starters, which need no hub: {listing(starters())}"


def directory_of(source: str | Path) -> Path | None:
    """Where the files of a model are: a directory, a starter's, or the hub's local copy; None if that is not known."""
    location, directory = located(source, None)
    return directory if directory is not None else hub_directory(location)


def hub_directory(location: str) -> Path | None:
    from transformers.utils import cached_file

    found = cached_file(location, "config.json", _raise_exceptions_for_missing_entries=False)
    return Path(os.path.dirname(found)) if found else None


def all_of_hub(location: str) -> Path:
    """The local copy of a hub model with all its weights, fetched where it is not here."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(location, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except Exception as error:
        raise no_hub(location, error) from error


def config_of(location: str, source: str | Path, *, hub: bool) -> Any:
    """The configuration, or the error that says why there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(**asked(location))
    except Exception as error:
        if hub and isinstance(error, OSError):
            raise no_hub(str(source), error) from error
        raise not_loadable(source, "configuration", error) from error


def asked(location: str) -> dict[str, str]:
    """What transformers is asked for: a directory or id, and the file of it where that is a GGUF file."""
    path = Path(location)
    if path.suffix == ".gguf" and path.is_file():
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return {"pretrained_model_name_or_path": location}


def no_hub(source: str, error: BaseException) -> UserError:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    why = "offline mode is on (HF_HUB_OFFLINE) and there is no local copy" if HF_HUB_OFFLINE else first_line(error)
    close = nearest(source, starters(), n=1)
    return UserError(
        f"model {source!r} is no directory and no starter, and the model hub did not give it: {why}",
        fix=(f"did you mean {close[0]}? " if close else "")
        + f"give a directory, {_names_of_starters()}; for the hub, check the id, the network and your access",
    )


def not_loadable(source: str | Path, part: str, error: BaseException) -> UserError:
    from transformers import __version__

    if "trust_remote_code" in str(error):
        return UserError(
            f"model {source}: its {part} needs Python code that comes with the model, which Trimtab does not run",
            fix="use a model whose architecture is part of transformers",
        )
    if "safetensors" in str(error) and "does not appear to have a file" in str(error):
        return UserError(
            f"model {source}: it has no safetensors weights, and a pickle can run any code when loaded",
            fix="use a model or revision with safetensors weights, or convert it and give the directory",
        )
    return UserError(
        f"model {source}: transformers {__version__} could not load its {part}: {first_line(error)}",
        fix="see whether the files belong together, and whether this version of transformers knows the architecture",
    )
