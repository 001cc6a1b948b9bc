"""`trimtab.load`: an adapter of ours, or one of another library that is recognized by its files."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from trimtab.core import save
from trimtab.interop.adapterhub import from_adapterhub, is_adapterhub
from trimtab.interop.kohya import from_kohya, is_kohya
from trimtab.interop.peft.files import is_peft
from trimtab.interop.peft.reading import from_peft
from trimtab.interop.saved import Saved


def load(model: nn.Module, directory: str | Path, name: str | None = None, *, trainable: bool = True) -> nn.Module:
    """Attach a saved adapter, bit for bit, under its own name or `name`; returns the model.

    A directory of Hugging Face PEFT or of AdapterHub is recognized by its `adapter_config.json`, a file of kohya's
    scripts or of LyCORIS by its keys. Nothing is drawn or decomposed again.
    With `trainable=False` its tensors do not ask for gradients. Errors: every tensor and module that does not fit, at
    once; nothing is attached then.
    """
    if (Path(directory) / save.RECORD).is_file() or not is_foreign(directory):
        return save.load(model, directory, name, trainable=trainable)
    saved = read_foreign(model, directory, name)
    return save.attach_saved(model, saved.record, saved.tensors, directory, name, trainable=trainable)


def is_foreign(directory: str | Path) -> bool:
    """Whether a directory or a file is an adapter of another library."""
    return is_kohya(directory) or is_adapterhub(directory) or is_peft(directory)


def read_foreign(model: nn.Module, directory: str | Path, name: str | None = None) -> Saved:
    """An adapter of another library as one of ours, for this model."""
    read = from_kohya if is_kohya(directory) else from_adapterhub if is_adapterhub(directory) else from_peft
    return read(model, directory, name or "default")
