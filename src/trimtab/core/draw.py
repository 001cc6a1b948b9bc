"""The deltas of a part as they start: drawn by (seed, site), not yet installed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.attention import HEADS, heads_of
from trimtab.core.delta import Delta, Group, build
from trimtab.core.deltas import Deltas
from trimtab.core.errors import UserError, listing
from trimtab.core.hosts import is_raw, plain_base, raw_weight
from trimtab.core.method import Method
from trimtab.core.modules import ancestors
from trimtab.core.places import Place
from trimtab.core.site import Base, Known, RawBase, Site
from trimtab.core.stack import slot_name
from trimtab.core.state import Part, State
from trimtab.core.taken import encodable


def prepare(
    model: nn.Module,
    state: State,
    part: Part,
    name: str,
    seed: int,
    dtype: torch.dtype | None,
    statistics: Mapping[str, Tensor],
    made_on: torch.device | None = None,
) -> tuple[list[Delta], Group | None]:
    """The deltas of one part, drawn but not yet installed."""
    method = part.method
    wanted = method.statistics
    measured = {site: {wanted: value} for site, value in statistics.items()} if wanted else {}
    sites = [site_at(model, state, place, index, measured) for index, place in enumerate(part.places)]
    for site, place in zip(sites, part.places, strict=True):
        site.format = part.format if place in encodable(model, part) else None
    real = wanted is not None and dtype_and_device(model, part.places[0])[1].type != "meta"
    missing = [site.name for site in sites if real and wanted not in site.statistics]
    if missing:
        raise UserError(
            f"attach({type(method).__name__}): no {wanted} was measured for {listing(missing, 3)}",
            fix=f"statistics=trimtab.{wanted}(model, batches, where={part.where!r})",
        )
    slot = slot_name(name, part.label)
    deltas = []
    with torch.no_grad():
        kind, device = dtype_and_device(model, part.places[0])
        device = made_on or device
        with drawing(seed, part.label, device):
            drawn = method.shared(sites)
        group = Group(build(drawn, dtype=dtype or kind, device=device)) if drawn else None
        for site, place in zip(sites, part.places, strict=True):
            kind, device = dtype_and_device(model, place)
            device = made_on or device
            site.shared = group
            with drawing(seed, site.name, device):
                tensors = init_at(method, site, place, model)
            delta = Delta(
                method, build(tensors, dtype=dtype or kind, device=device), adapter=name, slot=slot, rows=place.rows
            )
            delta.master = dtype is not None and dtype != kind
            delta.share(group)
            deltas.append(delta)
    return deltas, group


def init_at(method: Method, site: Site, place: Place, model: nn.Module) -> dict[str, Any]:
    """`method.init(site)`; for a stack of expert matrices, one draw per expert, stacked."""
    module = model.get_submodule(place.module)
    if not is_raw(module, place) or raw_weight(module, place).kind != "experts":
        return method.init(site)
    stacked, b = site.base.weight, site.base.bias
    drawn = []
    for expert, matrix in enumerate(stacked):
        base = RawBase(matrix, None if b is None else b[expert])
        measured = {name: value[expert] for name, value in site.statistics.items()}
        drawn.append(method.init(Site(**{**vars(site), "base": base, "statistics": measured})))
    return _stack(drawn)


def site_at(
    model: nn.Module,
    state: State,
    place: Place,
    index: int = 0,
    statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Site:
    """The Site of a place, with the deltas that are active there now as part of its base."""
    module = model.get_submodule(place.module)
    width = place.features or 0
    base = plain_base(module, place, width)
    deltas = module._modules.get("delta")
    if isinstance(deltas, Deltas) and not is_raw(module, place):
        base = deltas.over(base, state.active)
    if place.rows is not None:
        base = rows_of(base, place)
    stats = (statistics or {}).get(place.name, {})
    kind = "linear" if place.kind == "raw" else place.kind
    takes_bias = not is_raw(module, place) or base.bias is not None  # an edited activation has no bias to ask for
    return Site(
        *(place.name, base, kind, place.role, place.layer, width, index, stats),
        takes_bias=takes_bias,
        heads=heads_of(module) if kind == "attention" else heads_around(model, place.module),
    )


def heads_around(model: nn.Module, path: str) -> int:
    """How many query heads the attention a module belongs to has, as it or its configuration says."""
    for module in reversed(ancestors(model, path)):
        for source in (module, getattr(module, "config", None)):
            for name in HEADS:
                count = getattr(source, name, None)
                if isinstance(count, int):
                    return count
    return 0


def rows_of(base: Base, place: Place) -> Base:
    """The rows of a base that a place names; for experts, of each matrix."""
    assert place.rows is not None
    if isinstance(base, RawBase) and base.weight.ndim == 3:
        return RawBase(place.rows.of(base.weight, 1), None if base.bias is None else place.rows.of(base.bias, 1))
    return Known(base, place.rows)


def dtype_and_device(model: nn.Module, place: Place) -> tuple[torch.dtype, torch.device]:
    """Where and in which floating type a place's trained tensors live: as its weight, or as the model's first one."""
    module = model.get_submodule(place.module)
    inside = module.modules() if place.kind == "attention" else [module]
    code = next((one._modules["code"] for one in inside if "code" in one._modules), None)
    if code is not None:
        return code.dtype, next(code.parameters()).device  # type: ignore[return-value]
    for source in (module.parameters(), model.parameters()):
        for parameter in source:
            if parameter.is_floating_point():
                return parameter.dtype, parameter.device
    return torch.get_default_dtype(), torch.device("cpu")


class drawing:
    """Context in which torch's CPU generator is seeded by (seed, name) and new tensors land on CPU, or on meta."""

    def __init__(self, seed: int, name: str, device: torch.device) -> None:
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        self.seed = int.from_bytes(digest[:8], "little") >> 1
        self.device = torch.device("meta") if device.type == "meta" else torch.device("cpu")

    def __enter__(self) -> None:
        self.before = torch.get_rng_state()
        torch.random.default_generator.manual_seed(self.seed)
        self.context = self.device
        self.context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)
        torch.set_rng_state(self.before)


def _stack(drawn: list[dict[str, Any]]) -> dict[str, Any]:
    done: dict[str, Any] = {}
    for key, first in drawn[0].items():
        values = [one[key] for one in drawn]
        if isinstance(first, Mapping):
            done[key] = _stack(values)
        else:
            stacked = torch.stack([value.detach() for value in values])
            done[key] = nn.Parameter(stacked, first.requires_grad) if isinstance(first, nn.Parameter) else stacked
    return done
