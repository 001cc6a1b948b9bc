"""What there is: methods, storage formats and presets by name, and what each says of itself."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from trimtab.core.method import Placed
from trimtab.core.registry import find, name_of, names, to_json


class Catalog(Mapping[str, Any]):
    """Name -> class; a file is imported when its class is asked for."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __getitem__(self, name: str) -> Any:
        if name not in names(self.kind):
            raise KeyError(name)
        return find(name, self.kind)

    def __iter__(self) -> Iterator[str]:
        return iter(names(self.kind))

    def __len__(self) -> int:
        return len(names(self.kind))

    def __repr__(self) -> str:
        return f"{{{', '.join(self)}}}"


def methods() -> Mapping[str, Any]:
    """Every registered method: name -> class, with `paper`, `space`, `where`, `learning_rate`, `mergeable`."""
    return Catalog("methods")


def formats() -> Mapping[str, Any]:
    """Every storage format: name -> class."""
    return Catalog("storage")


def presets() -> dict[str, Callable[..., Any]]:
    """Every preset: name in lower case -> function."""
    from trimtab import presets as module

    found = {name: value for name, value in vars(module).items() if name[:1].isupper() and inspect.isfunction(value)}
    return {name.lower(): value for name, value in sorted(found.items()) if value.__module__ == module.__name__}


def describe(name: str) -> dict[str, Any]:
    """What a method, preset or format says of itself, as plain data; `fields` are its settings as JSON, with types."""
    known = presets()
    plain = name.lower().replace("-", "").replace("_", "")
    if plain in known:
        made = known[plain]
        parts = [{"where": where, **to_json(method)} for method, where in parts_of(made())]
        facts = {"name": plain, "space": "preset", "equation": first_line(made), "settings": settings(made)}
        return facts | {"fields": fields(made), "parts": parts}
    if plain in {one.replace("_", "") for one in formats()}:
        cls: Any = find(name, "storage")
        facts = {"name": name_of(cls), "class": cls.__name__, "space": "storage", "equation": first_line(cls)}
        return facts | {"settings": settings(cls), "fields": fields(cls)}
    cls = find(name)
    return {
        "name": name_of(cls),
        "class": cls.__name__,
        "space": cls.space,
        "paper": cls.paper,
        "equation": first_line(cls),
        "where": cls.where,
        "learning_rate": cls.learning_rate,
        "hosts": sorted(cls.hosts),
        "mergeable": cls.mergeable,
        "settings": settings(cls),
        "fields": fields(cls),
        "laws": dict(cls.laws),
        "presets": [one for one, made in known.items() if any(uses(part, cls) for part, _ in parts_of(made()))],
    }


def parts_of(made: Any) -> list[tuple[Any, str]]:
    """The methods of what a preset returns, each with where it goes."""
    listed = made if isinstance(made, tuple | list) else (made,)
    pairs = [tuple(one) if isinstance(one, Placed) else (one, None) for one in listed]
    return [(method, where or method.where) for method, where in pairs]


def uses(method: Any, cls: type) -> bool:
    """Whether a method is of a class, or has one of it in its fields."""
    inner = [getattr(method, field.name) for field in dataclasses.fields(method)]
    return type(method) is cls or any(uses(one, cls) for one in inner if dataclasses.is_dataclass(one))


def fields(made: Any) -> dict[str, dict[str, Any]]:
    """Setting -> type and default as JSON, of a method class or a preset; a default made anew is made."""
    factories = {one.name: one.default_factory for one in dataclasses.fields(made)} if isinstance(made, type) else {}
    found = {}
    for name, one in inspect.signature(made).parameters.items():
        factory = factories.get(name, dataclasses.MISSING)
        value = factory() if callable(factory) else one.default
        found[name] = {"type": str(one.annotation), "default": to_json(value)}
    return found


def settings(made: Any) -> dict[str, Any]:
    """Setting -> default of a method class or a preset."""
    return {one: value.default for one, value in inspect.signature(made).parameters.items()}


def first_line(made: Any) -> str:
    """The first line of a docstring: for a method, its equation."""
    return next(iter((inspect.getdoc(made) or "").splitlines()), "")


def markdown() -> str:
    """The table of methods and presets as Markdown, as it stands in the README."""
    lines = ["| name | what it computes | default sites | merges | paper |", "|---|---|---|---|---|"]
    for name in methods():
        facts = describe(name)
        paper = f"[{facts['paper']}](https://arxiv.org/abs/{facts['paper']})" if facts["paper"] else ""
        merges = "yes" if facts["mergeable"] else "no"
        lines.append(f"| `{name}` | {cell(facts['equation'])} | `{facts['where']}` | {merges} | {paper} |")
    for name, made in presets().items():
        lines.append(f"| `{name}` (preset) | {cell(first_line(made))} | | | |")
    return "\n".join(lines)


def cell(text: str) -> str:
    """A text inside a Markdown table."""
    return text.replace("|", "\\|").rstrip(".")
