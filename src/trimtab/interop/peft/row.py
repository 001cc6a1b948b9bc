"""A row of the table of PEFT types: what it maps, and what its functions are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.places import Place
from trimtab.core.site import Site
from trimtab.interop.saved import SavedPart, SavedSite

Tensors = dict[str, Tensor]
GROUP = "@group"
"""Among the settings of a site: what has to be equal for two sites to be one part."""


@dataclass
class Layer:
    """The tensors that a PEFT file has for one module, and what the file and the model say about it."""

    place: Place
    shape: tuple[int, int]
    tensors: Tensors
    config: Mapping[str, Any]
    shared: Tensors
    module: nn.Module

    @property
    def conv1d(self) -> bool:
        """Whether it is GPT-2's transposed linear layer."""
        return hasattr(self.module, "nf")


Settings = dict[str, Any]
Reading = tuple[Settings, Tensors, Tensors]
"""Settings of the method, its tensors at one site, and what its sites share."""
Writing = tuple[Settings, Tensors]
"""Entries of PEFT's config, and its tensors at one module."""


@dataclass(frozen=True)
class Row:
    """One PEFT type beside one method."""

    peft: str
    method: str
    tensors: Mapping[str, str] = field(default_factory=dict)
    """Name at a module in PEFT's file -> name at a site in ours."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Field of the method -> key of PEFT's config."""
    patterns: Mapping[str, str] = field(default_factory=dict)
    """Field of the method -> key of PEFT's config that sets it for some modules."""
    shared: Mapping[str, str] = field(default_factory=dict)
    """Name at the root of PEFT's file -> name among what sites share."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Keys of PEFT's config with the one value that is understood."""
    constant: Mapping[str, Any] = field(default_factory=dict)
    """Keys that PEFT's config gets whatever the method."""
    read: Callable[[Layer, Reading], Reading] | None = None
    write: Callable[[SavedPart, SavedSite, Writing], Writing] | None = None
    conv1d: bool = True
    """Whether PEFT puts it on GPT-2's Conv1D."""
    optional: frozenset[str] = frozenset()
    """Tensors of `tensors` that a file may lack."""
    ignored: frozenset[str] = frozenset()
    """Tensors at a module that repeat what stands elsewhere in the file."""
    chosen: Callable[[Mapping[str, Any]], bool] | None = None
    """Which of several rows of one PEFT type a config means."""
    share: Callable[[Sequence[Layer], Tensors], Tensors] | None = None
    """What the layers of one part use together, out of what all layers of the file do."""
    unshare: Callable[[SavedPart], Tensors] | None = None
    """The inverse, by PEFT's names."""
    gather: Callable[[Sequence[Layer], list[Settings]], list[Settings]] | None = None
    """Settings that only all layers together decide."""


def refuse(what: str, why: str, fix: str | None = None) -> UserError:
    """An error about something one of the two formats cannot say."""
    return UserError(f"PEFT: {what}: {why}", fix=fix)


def site_of(layer: Layer) -> Site:
    """A stand-in for the site of a layer, with its name and role."""
    return Site(layer.place.name, None, layer.place.kind, role=layer.place.role)  # type: ignore[arg-type]
