"""The registry is the folder: `methods/<space>/<name>.py` holds one class, named like its file but for case and `_`."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from trimtab.core.errors import UserError, listing, nearest

ROOT = Path(__file__).parent.parent
FOLDERS = {"start": "methods/start", "active": "optim/active"}
"""Where the files of a kind are, if not in the folder of its name."""
WORDS = {
    "methods": "method",
    "start": "start",
    "storage": "storage format",
    "optim": "optimizer",
    "active": "schedule of what trains",
}
_outside: dict[str, type] = {}


@cache
def _files(kind: str) -> dict[str, str]:
    """name -> module path of every file of a kind, without importing any."""
    found, home = {}, ROOT / FOLDERS.get(kind, kind)
    for path in sorted(home.rglob("*.py")):
        if not path.stem.startswith("_") and (path.parent == home or path.parent.name not in FOLDERS):
            found[path.stem] = ".".join(("trimtab", *path.relative_to(ROOT).with_suffix("").parts))
    return found


def names(kind: str = "methods") -> list[str]:
    """Every registered name, without importing its file."""
    return sorted({*_files(kind), *_outside} if kind == "methods" else _files(kind))


def find(name: str, kind: str = "methods") -> type:
    """The class registered under a name (`lora`) or called so (`LoRA`), in any spelling of case, `-` and `_`."""
    wanted = _plain(name)
    for known, cls in _outside.items():
        if kind == "methods" and _plain(known) == wanted:
            return cls
    for stem, module in _files(kind).items():
        if _plain(stem) == wanted:
            return _class_in(module, stem)
    close = nearest(name, names(kind))
    raise UserError(
        f"no {WORDS[kind]} named {name!r}; there are {len(names(kind))}",
        fix=f"did you mean {listing(close)}?" if close else f"one of {listing(names(kind), 60)}",
    )


def register(cls: type) -> type:
    """Class decorator for a method that lives outside this package: it gets a name, a file format and the laws."""
    _outside[name_of(cls)] = cls
    return cls


def name_of(cls: type) -> str:
    """The registered name of a class: its file's name, or its own in lower case outside this package."""
    module = cls.__module__
    return module.rsplit(".", 1)[-1] if module.startswith("trimtab.") else cls.__name__.lower()


def to_json(value: Any) -> Any:
    """A method or format as plain data: {"name": "lora", "rank": 8, ...}; nested ones are nested."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        kind = kind_of(type(value))
        return {kind: name_of(type(value)), **fields}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    return [to_json(item) for item in value] if isinstance(value, list | tuple) else value


def kind_of(cls: type) -> str:
    """`methods`, `start`, `storage`, `optim` or `active`: what a class is registered as."""
    kinds = {"trimtab.storage": "storage", "trimtab.methods.start": "start"}
    kinds |= {"trimtab.optim.active": "active", "trimtab.optim": "optim"}
    return next((kind for home, kind in kinds.items() if cls.__module__.startswith(home)), "methods")


def from_json(data: Any) -> Any:
    """The inverse of `to_json`; an unknown name or field is an error naming the nearest known one."""
    if isinstance(data, Mapping):
        for kind in WORDS:
            if kind in data:
                fields = {key: from_json(item) for key, item in data.items() if key != kind}
                return make(find(data[kind], kind), fields)
        return {key: from_json(item) for key, item in data.items()}
    return tuple(from_json(item) for item in data) if isinstance(data, list) else data


def make(cls: type, fields: Mapping[str, Any]) -> Any:
    """An instance of a method or format from its fields, all unknown ones reported together."""
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    unknown = [key for key in fields if key not in known]
    if unknown:
        close = [near for key in unknown for near in nearest(key, known)]
        raise UserError(
            f"{cls.__name__}: unknown setting {listing(unknown)}; it has {listing(known)}",
            fix=f"did you mean {listing(close)}?" if close else None,
        )
    return cls(**fields)


def dumps(value: Any) -> str:
    """`to_json` as text, keys in field order."""
    return json.dumps(to_json(value))


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _class_in(module: str, stem: str) -> type:
    loaded = importlib.import_module(module)
    for attribute, value in vars(loaded).items():
        if isinstance(value, type) and value.__module__ == module and _plain(attribute) == _plain(stem):
            return value
    raise ImportError(f"{module} has no class named like its file")
