"""A saved adapter in memory: its record and its tensors, as `adapter.json` and `adapter.safetensors` hold them.

Every conversion is a function from one of these to another, or to a foreign file; none needs the adapter attached.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.draw import site_at
from trimtab.core.errors import listing
from trimtab.core.method import Method
from trimtab.core.places import Place, places
from trimtab.core.registry import from_json, name_of, to_json
from trimtab.core.save import (
    VERSION,
    adapter_tensors,
    describe,
    entry_of,
    place_of,
    plain_class,
    read_record,
    read_tensors,
    whole,
    write_adapter,
)
from trimtab.core.state import State, check_names, require_state


@dataclass
class Saved:
    """The record and the tensors of an adapter; keys are `<part>.<site>.<tensor>`."""

    record: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def parts(self) -> list[SavedPart]:
        """Its parts, each with its own tensors by site."""
        return [part_of(entry, self.tensors) for entry in self.record["parts"]]


@dataclass
class SavedPart:
    """One part of a saved adapter."""

    label: str
    method: Any
    where: str
    sites: list[SavedSite]
    shared: dict[str, Tensor]
    encoded: bool
    """Whether its weights were quantized without what its start takes out of them."""


@dataclass
class SavedSite:
    """One site of a part: its place, the shape (out, in) of its weight, and its tensors."""

    place: Place
    shape: tuple[int, int]
    tensors: dict[str, Tensor]


@dataclass
class Draft:
    """What a reader makes of one site; sites with equal methods become one part."""

    place: Place
    method: Method
    tensors: dict[str, Tensor]
    shared: dict[str, Tensor] = field(default_factory=dict)
    group: Any = None
    """Sites of one method that cannot share a part differ in it."""


def part_of(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SavedPart:
    """A part from its entry in a record and all tensors of the file."""
    label, sites = entry["label"], []
    for one in entry["sites"]:
        place = place_of(one)
        start = f"{label}.{place.name}."
        mine = {key[len(start) :]: value for key, value in tensors.items() if key.startswith(start)}
        out, into = one["shape"]
        sites.append(SavedSite(place, (out, into), mine))
    start = f"{label}.@shared."
    shared = {key[len(start) :]: value for key, value in tensors.items() if key.startswith(start)}
    return SavedPart(label, from_json(entry["method"]), entry["where"], sites, shared, "quantized" in entry)


def open_saved(directory: str | Path) -> Saved:
    """A saved adapter from its directory, its checksum verified."""
    record = read_record(directory)
    return Saved(record, read_tensors(Path(directory), record))


def saved_of(model: nn.Module, name: str = "default", *, verb: str = "convert") -> Saved:
    """An attached adapter as it would be saved."""
    state = require_state(model, verb)
    check_names(state, [name], verb)
    tensors = {key: whole(value.detach()).cpu() for key, value in adapter_tensors(model, name).items()}
    return Saved(describe(model, state.adapters[name]) | {"notes": {}}, tensors)


def write_saved(saved: Saved, directory: str | Path) -> Path:
    """Write a saved adapter to a directory, both files or none."""
    write_adapter(Path(directory), saved.record, saved.tensors, saved.record.get("notes", {}))
    return Path(directory)


def assemble(
    model: nn.Module, drafts: Iterable[Draft], *, name: str = "default", notes: Mapping[str, Any] | None = None
) -> Saved:
    """A saved adapter from drafts: those with equal methods, in their first order, become one part each."""
    groups: dict[Any, list[Draft]] = {}
    for draft in drafts:
        groups.setdefault((name_of(type(draft.method)), draft.method, draft.group), []).append(draft)
    entries, tensors, labels = [], dict[str, Tensor](), dict[str, int]()
    for (stem, method, _), members in groups.items():
        labels[stem] = labels.get(stem, 0) + 1
        label = stem if labels[stem] == 1 else f"{stem}-{labels[stem]}"
        sites = []
        for draft in members:
            shape = list(site_at(model, State(), draft.place).base.shape)
            sites.append(entry_of(draft.place) | {"shape": shape})
            tensors |= {f"{label}.{draft.place.name}.{key}": value for key, value in draft.tensors.items()}
        tensors |= {f"{label}.@shared.{key}": value for draft in members for key, value in draft.shared.items()}
        entries.append({"label": label, "method": to_json(method), "where": worded(members), "sites": sites})
    config = getattr(model, "config", None)
    record = {
        "format": "trimtab-adapter",
        "version": VERSION,
        "name": name,
        "seed": 0,
        "base": {"class": plain_class(model), "model_type": getattr(config, "model_type", None)},
        "parts": entries,
        "notes": dict(notes or {}),
    }
    held = {key: value if isinstance(value, Tensor) else torch.as_tensor(value) for key, value in tensors.items()}
    return Saved(record, held)


def worded(members: Iterable[Draft]) -> str:
    """Where a part is, in few words: roles where there are any, else the last names of the paths."""
    found = (draft.place.role or draft.place.module.rpartition(".")[2] for draft in members)
    return listing(dict.fromkeys(found), 12)


def places_by_path(model: nn.Module) -> dict[str, Place]:
    """Path of a module, or of a raw parameter, to the place it is: the whole weight, not a part of it."""
    found: dict[str, Place] = {}
    for place in places(model):
        if place.part is None and place.kind not in ("opaque", "attention"):
            found.setdefault(place.name, place)
    return found
