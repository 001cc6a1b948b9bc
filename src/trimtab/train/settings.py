"""Names with settings as things, in the types of their defaults: methods, presets, optimizers, schedules, formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.core.errors import UserError, listing, nearest

DOUBLE = ("nf4-double", "nf4dq", "nf4-dq")
"""What NF4 with quantized scales is called."""


def plainly(name: str) -> str:
    """A name in lower case with dashes."""
    return name.lower().replace("_", "-")


def unfolded(value: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and settings in `{name: galore, rank: 64}` or `{galore: {rank: 64}}`."""
    if "name" in value:
        return str(value["name"]), {key: one for key, one in value.items() if key != "name"}
    name, settings = next(iter(value.items()), ("", None))
    if len(value) != 1 or not isinstance(settings or {}, Mapping):
        raise UserError(f"recipe: {dict(value)} does not name one thing", fix="{name: galore, rank: 64}")
    return str(name), dict(settings or {})


def pairs(text: str) -> dict[str, str]:
    """`a=b,c=d` as a mapping."""
    found = {}
    for item in filter(None, (one.strip() for one in text.split(","))):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"{item!r} is not of the form role=column")
        found[key.strip()] = value.strip()
    return found


def method_settings(name: str) -> dict[str, Any]:
    """Setting -> default of a method or preset, by its name."""
    import inspect

    made = factory(name)
    return {key: one.default for key, one in inspect.signature(made).parameters.items()}


def factory(name: str) -> Any:
    """The class of a method, or the function of a preset, in any spelling."""
    from trimtab import presets
    from trimtab.core.registry import find, names

    plain = name.lower().replace("-", "").replace("_", "")
    listed = {key: value for key, value in vars(presets).items() if key[:1].isupper() and callable(value)}
    for key, value in listed.items():
        if key.lower() == plain and getattr(value, "__module__", "") == presets.__name__:
            return value
    try:
        return find(name)
    except UserError:
        close = nearest(name, [*names(), *map(str.lower, listed)])
        raise UserError(
            f"no method or preset named {name!r}",
            fix=f"did you mean {listing(close)}?" if close else "`trimtab methods` lists them",
        ) from None


def registered_settings(name: str, kind: str) -> dict[str, Any]:
    """Setting -> default of an optimizer, a schedule or a format, by its name."""
    import inspect

    from trimtab.core.registry import find

    name = "nf4" if kind == "storage" and plainly(name) in DOUBLE else name
    return {key: one.default for key, one in inspect.signature(find(name, kind)).parameters.items()}


def build_named(kind: str, name: str, settings: Mapping[str, Any]) -> Any:
    """An optimizer, a schedule or a format by its name; settings that are mappings or lists of them are made too."""
    from trimtab.core.registry import find

    def nested(value: Any) -> Any:
        if isinstance(value, Mapping):
            return build_named(kind, *unfolded(value))
        return tuple(map(nested, value)) if isinstance(value, list | tuple) else value

    made = {key: nested(value) for key, value in settings.items()}
    if kind == "storage" and plainly(name) in DOUBLE:
        name, made = "nf4", {"double": True, **made}
    return made_with(name, find(name, kind), registered_settings(name, kind), made)


def made_with(name: str, made: Any, defaults: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """What a class or preset makes of settings, in the types of their defaults; all problems are told at once."""
    chosen: dict[str, Any] = {}
    problems = []
    for key, value in settings.items():
        if key not in defaults:
            close = nearest(key, defaults, 1)
            problems.append(f"{name} has no setting {key!r}" + (f" (nearest: {close[0]})" if close else ""))
            continue
        try:
            chosen[key] = typed(value, defaults[key])
        except ValueError:
            problems.append(f"{key}: {value!r} is not like its default {defaults[key]!r}")
    if problems:
        raise UserError("recipe: " + "; ".join(problems), fix=f"its settings are {listing(defaults) or 'none'}")
    return made(**chosen)


def typed(value: Any, default: Any) -> Any:
    """A flag's text in the type of the setting's default."""
    if not isinstance(value, str) or isinstance(default, str):
        return type(default)(value) if isinstance(default, float) and isinstance(value, int) else value
    if value.lower() in ("none", "null"):
        return None
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise ValueError(value)
        return value.lower() == "true"
    whole = default is None and value.lstrip("+-").isdigit()
    return int(value) if whole or isinstance(default, int) else float(value)
