"""Families: which module of an architecture plays which role, as data.

A table file `trimtab/families/<name>.py` holds one `FAMILY = Family(...)`. Core never imports the tables by name: they
are found when the first model is looked at. A model no table knows gets a `Family` made up by `guess` from its own
shapes and names, so one engine (`trimtab.core.places`) serves both.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from trimtab.core.modules import walk, within

CONTRIBUTIONS = frozenset({"attn", "ffn", "cross.attn"})
"""What sub-layers add to the residual stream."""
SINGLE = CONTRIBUTIONS | {"stream"}
"""Roles that name one module per block: the first pattern that exists wins. Other roles take all that exist."""


@dataclass(frozen=True)
class Family:
    """Which module of a model family plays which role. Pure data.

    Paths in `roles` start at the block; those in `blocks` and `outside` are matched at the end of the full path. A path
    may name a module (`mlp.down_proj`), a raw parameter (`mlp.experts.down_proj`), or a part of a fused one
    (`attn.c_attn:q`). `encoder/` in front limits it to that stack, and `*` stands for anything.
    """

    name: str
    """Equals the file name."""
    model_types: tuple[str, ...]
    """Values of `config.model_type` that this table describes."""
    blocks: Mapping[str, str | None]
    """End of the path of each list of blocks -> name of its stack (None where there is only one)."""
    roles: Mapping[str, str | tuple[str, ...]]
    """Role -> path or paths inside a block. Those in `SINGLE`: first that exists; else all that exist."""
    fused: Mapping[str, Mapping[str, int | str]] = field(default_factory=dict)
    """Path of a fused weight -> its parts in row order -> their share of the rows (a number or a config field).

    Each part is one range of rows; what has q, k and v head by head is in `by_head`.
    """
    by_head: tuple[str, ...] = ()
    """Paths of fused weights whose rows come head by head: for every key head its queries, the key, the value."""
    transposed: tuple[str, ...] = ()
    """Raw expert parameters stored (experts, in, out) instead of (experts, out, in)."""
    outside: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    """Roles of modules outside the blocks, `embed` above all."""
    enters: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    """`attn`, `ffn`, `cross.attn` -> the module of a block whose input is the residual stream as this sub-layer takes
    it in: the norm in front of it, or where there is none the sub-layer's own first module. First that exists."""


def paths_of(patterns: str | Sequence[str]) -> tuple[str, ...]:
    """One pattern or several, as a tuple."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


@functools.cache
def tables() -> Mapping[str, Family]:
    """`config.model_type` -> table, over all files of `trimtab.families`; read once, at the first question."""
    package = importlib.import_module("trimtab.families")
    found: dict[str, Family] = {}
    for info in pkgutil.iter_modules(package.__path__):
        family: Family = importlib.import_module(f"{package.__name__}.{info.name}").FAMILY
        if family.name != info.name:
            raise ValueError(f"families/{info.name}.py calls itself {family.name!r}")
        for model_type in family.model_types:
            if model_type in found:
                raise ValueError(f"model type {model_type!r} is in families {found[model_type].name} and {family.name}")
            found[model_type] = family
    return found


def regions(model: nn.Module) -> list[tuple[str, nn.Module, Family]]:
    """(path, module, table) of the outermost modules whose `config.model_type` is in a table.

    Usually the model itself; inside a wrapper or a composite model, the parts that are known.
    """
    found: list[tuple[str, nn.Module, Family]] = []
    for path, module in walk(model):
        family = tables().get(_model_type(module))
        if family is not None and not any(within(path, outer) for outer, _, _ in found):
            found.append((path, module, family))
    return found


def family_of(model: nn.Module) -> Family | None:
    """The table of a model, by `config.model_type` (its own, or that of the first known part); None means shapes."""
    found = regions(model)
    return found[0][2] if found else None


def _model_type(module: nn.Module) -> str:
    model_type = getattr(getattr(module, "config", None), "model_type", None)
    return model_type if isinstance(model_type, str) else ""
