"""Paged: a state that is not in the memory of the device."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.transform import State, Transform, named


@dataclass(frozen=True)
class Paged(Transform):
    """u = inner(g), with the state of `inner` in pinned host memory or in files: the same steps to the bit.

    A CUDA parameter's state is in pinned memory and on the device only during its own step; a CPU parameter's is in
    memory-mapped files, which the system writes out and reads back as it needs the memory. With a `folder` it is in
    files for either. Files have no name in the folder and are gone with the process, whatever ends it.
    State bytes: those of `inner`, of which none on the device. Tensors of fewer than `smallest` values stay. Costs a
    copy of the state to the device and back per step.
    arXiv 2305.14314, section 3, which pages through CUDA's managed memory, by need; here every step moves it.
    """

    paper: ClassVar[str] = "2305.14314"

    inner: str | Transform = "adamw"
    folder: str = ""
    smallest: int = 100_000

    @property
    def inners(self) -> tuple[Transform, ...]:
        return (named(self.inner),)

    def init(self, p: Tensor) -> State:
        return self.moved(self.inners[0].init(p))

    def update(self, g: Tensor, s: State, p: Tensor) -> Tensor:
        here = brought(s, p.device)
        u = self.inners[0].update(g, here, p)
        put_back(s, here)
        return u

    def state_bytes(self, shape: Sequence[int]) -> int:
        return self.inners[0].state_bytes(shape)

    def moved(self, s: State) -> State:
        """A state with its large tensors in pages."""
        found: State = {}
        for key, value in s.items():
            if isinstance(value, dict):
                found[key] = self.moved(value)
            else:
                found[key] = self.page(value) if value.numel() >= self.smallest else value
        return found

    def page(self, value: Tensor) -> Tensor:
        """A tensor of the same values in pinned memory, or in a file."""
        if value.is_meta:
            return value
        if value.is_cuda and not self.folder:
            return value.cpu().pin_memory()
        return in_a_file(value, self.folder or tempfile.gettempdir())


def in_a_file(value: Tensor, folder: str) -> Tensor:
    """A tensor whose memory is a file that has no name any more."""
    try:
        handle, path = tempfile.mkstemp(prefix="trimtab-", suffix=".state", dir=folder)
        os.close(handle)
        os.truncate(path, value.nbytes)
        mapped = torch.from_file(path, shared=True, size=value.numel(), dtype=value.dtype)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"Paged: no file for {value.nbytes:,} bytes in {folder}: {error}", fix="another folder"
        ) from None
    with suppress(OSError):  # Windows keeps the name of a file that is in use
        os.unlink(path)
    return mapped.view(value.shape).copy_(value)


def brought(s: State, device: torch.device) -> State:
    """A state with its pages on the device, if that is another one; counters stay where they are."""
    found: State = {}
    for key, value in s.items():
        if isinstance(value, dict):
            found[key] = brought(value, device)
        else:
            found[key] = value.to(device, non_blocking=True) if value.ndim and value.device != device else value
    return found


def put_back(s: State, here: State) -> None:
    """Copy what was brought to the device back into its pages."""
    for key, value in s.items():
        if isinstance(value, dict):
            put_back(value, here[key])
        elif here[key] is not value:
            value.copy_(here[key])
