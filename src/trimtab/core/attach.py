"""The verbs attach, detach and activate. Each one plans first and changes the model only when nothing can fail."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core import batch as batches
from trimtab.core.attention import HEADS, heads_of, projections
from trimtab.core.delta import (
    Adapter,
    Delta,
    Deltas,
    Group,
    Part,
    State,
    build,
    check_names,
    edited_modules,
    require_state,
    state_of,
)
from trimtab.core.errors import UserError, listing
from trimtab.core.format import Format
from trimtab.core.install import (
    clash,
    deltas_class,
    install,
    is_raw,
    listen,
    plain_base,
    raw_weight,
    stand_aside,
    uninstall,
)
from trimtab.core.mapped import let_go_replaced
from trimtab.core.method import InputMethod, Method, Placed, WeightMethod
from trimtab.core.places import Place, Reading, places, readings
from trimtab.core.quantized import Taken, check_modules, quantize_module, quantize_without
from trimtab.core.registry import name_of
from trimtab.core.select import select
from trimtab.core.site import Base, Known, RawBase, Site

SHARED = "trimtab_shared"
Attachable = Method | Placed | Sequence[Method | Placed]


def attach(
    model: nn.Module,
    method: Attachable,
    where: str | None = None,
    *,
    name: str = "default",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    statistics: Mapping[str, Tensor] | None = None,
    quantize: Format | None = None,
    device: torch.device | None = None,
) -> nn.Module:
    """Put a method (or the parts of a preset) on a model, freeze everything else, and return the model.

    `where` says which sites, in the `where` language; None takes the method's own default. Adapters with different
    `name`s stack. The start depends on (seed, site name) only, not on the order of attaching. `dtype` keeps the
    trained tensors in a wider type than the base (fp32 masters under bf16). `statistics` maps site names to what the
    method wants measured first (`trimtab.fisher`). `quantize` stores the linear weights of its sites in a format, each
    without what a start takes out of it; they stay so after `detach`. `device` is where the tensors are made for a
    model on the meta device, as it is before its weights are read. Errors: a pattern that matches nothing, a site of
    a kind the method does not support, a name in use; nothing is changed then.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise UserError(f"attach: adapter name {name!r} is not usable", fix="letters, digits, - and _ only")
    state = state_of(model) or State()
    if name in state.adapters:
        raise UserError(
            f"attach: an adapter named {name!r} is attached already",
            fix=f"another name= to stack, or trimtab.detach(model, {name!r}) first",
        )
    parts = plan(model, method, where)
    two_ways(model, parts)
    if quantize is not None:
        encode_plain(model, parts, quantize)
    work = [(part, *prepare(model, state, part, name, seed, dtype, statistics or {}, device)) for part in parts]
    encode_rest(model, [(part, deltas) for part, deltas, _ in work])
    commit(model, state, Adapter(name, seed, parts), work)
    let_go_replaced(model)
    return model


def plan(model: nn.Module, method: Attachable, where: str | None = None) -> list[Part]:
    """Resolve where each part of an attachment goes; raises one error for everything that does not match."""
    listed = list(method) if isinstance(method, Sequence) else [method]
    if not listed:
        raise UserError("attach: no method was given")
    if where is not None and len(listed) > 1:
        raise UserError(
            "attach: `where` is ambiguous for a preset of several parts",
            fix='give each part its own place: [LoRA().at("q, v"), ...]',
        )
    parts: list[Part] = []
    labels: dict[str, int] = {}
    for item in listed:
        one, place = item if isinstance(item, Placed) else (item, None)
        if not isinstance(one, Method):
            starts = getattr(one, "begin", None) is not None
            fix = f"trimtab.LoRA(rank=8, start={one!r})" if starts else "for example trimtab.LoRA(rank=8)"
            raise UserError(f"attach: expected a method, found {one!r}", fix=fix)
        place = where or place or one.where
        stem = name_of(type(one))
        labels[stem] = labels.get(stem, 0) + 1
        label = stem if labels[stem] == 1 else f"{stem}-{labels[stem]}"
        try:
            places = select(model, place, kinds=kinds_of(one))
            if one.on_bias:
                places = biased(model, places, place)
        except UserError as error:
            raise UserError(f"attach({type(one).__name__}): {error.message}", fix=error.fix) from None
        problems = [problem for found in places if (problem := unfit(model, one, found))]
        if problems:
            raise UserError(f"attach({type(one).__name__}): {listing(problems, 5)}")
        parts.append(Part(one, place, label, places))
        sources(model, parts[-1])
    one_statistic(parts)
    return parts


def one_statistic(parts: Sequence[Part]) -> None:
    """Refuse parts that want different things measured at one site: what is measured goes by the name of its site."""
    seen: dict[str, tuple[str, Any]] = {}
    problems = []
    for part in parts:
        if part.method.statistics is None:
            continue
        wanted = (part.method.statistics, getattr(part.method, "tokens", ()))
        for place in part.places:
            first = seen.setdefault(place.name, wanted)
            if first != wanted:
                other = "those of another text" if first[0] == wanted[0] else f"its {wanted[0]}"
                problems.append(f"at {place.name} one part wants its {first[0]}, another {other}")
    if problems:
        raise UserError(f"attach: {listing(problems, 3)}", fix="attach one part after the other, each with its own")


def sources(model: nn.Module, part: Part) -> list[Reading | None]:
    """Where what a part reads beside its sites' inputs passes by; an error where that is not known."""
    if not part.method.source:
        return [None] * len(part.places)
    try:
        return readings(model, part.places, part.method.source)
    except UserError as error:
        raise UserError(f"attach({type(part.method).__name__}): {error.message}", fix=error.fix) from None


def biased(model: nn.Module, places: Sequence[Place], where: str) -> list[Place]:
    """The places that have a bias; an error where none has."""
    found = [place for place in places if site_at(model, State(), place).base.bias is not None]
    if not found:
        names = listing([place.name for place in places], 2)
        raise UserError(
            f'none of the {len(places)} places of "{where}" has a bias ({names})',
            fix="OutputBias adds a trained one where there is none",
        )
    return found


def two_ways(model: nn.Module, parts: Sequence[Part]) -> None:
    """Refuse parts that would edit one module in two ways: through its forward, as a raw weight, in its attention."""
    seen: dict[str, str] = {}
    problems = []
    for part in parts:
        for place in part.places:
            module = model.get_submodule(place.module)
            way = deltas_class(module, place).way
            if seen.setdefault(place.module, way) != way:
                both = " and ".join(sorted((seen[place.module], way), reverse=True))
                problems.append(f"{place.name} would be edited both {both}")
            elif (problem := clash(module, place)) is not None:
                problems.append(problem)
    if problems:
        raise UserError(f"attach: {listing(problems, 5)}", fix="leave these sites out of one of the two `where`s")


def encode_plain(model: nn.Module, parts: Sequence[Part], format: Format) -> None:
    """Check that the linear weights of all sites can be stored in a format; do it where no start takes anything out."""
    linear = {part.label: encodable(model, part) for part in parts}
    check_modules(model, [place.module for part in parts for place in linear[part.label]], format)
    for part in parts:
        if part.method.takes_out:
            part.format = format
            continue
        for path in dict.fromkeys(place.module for place in linear[part.label]):
            quantize_module(model.get_submodule(path), format)


def encodable(model: nn.Module, part: Part) -> list[Place]:
    """The places of a part that are linear layers: what a format can hold."""
    return [place for place in part.places if place.kind == "linear" and place.parameter is None]


def products(model: nn.Module, work: Sequence[tuple[Part, Sequence[Delta]]]) -> dict[str, tuple[Format, list[Taken]]]:
    """Module path -> the format it is encoded in, and what is taken out of it first."""
    found: dict[str, tuple[Format, list[Taken]]] = {}
    for part, deltas in work:
        linear = encodable(model, part)
        for place, delta in zip(part.places, deltas, strict=True):
            pair = part.method.taken(delta)
            if place in linear and pair is not None and part.format is not None:
                found.setdefault(place.module, (part.format, []))[1].append(Taken(place.rows, *pair))
    return found


def encode_rest(model: nn.Module, work: Sequence[tuple[Part, Sequence[Delta]]]) -> None:
    """Encode the dense linear weights under deltas without the products that these take out of them."""
    for path, (format, taken) in products(model, work).items():
        module = model.get_submodule(path)
        if "code" not in module._modules:
            quantize_without(module, format, taken)


def kinds_of(method: Method) -> frozenset[str]:
    """The kinds of place a method can sit on; an edit of a linear's weight fits a raw matrix too."""
    raw = isinstance(method, WeightMethod) and "linear" in method.hosts
    return method.hosts | {"raw"} if raw else method.hosts


def dropout_of(method: Method) -> float:
    """The dropout a method asks for, itself or in a method it is built on."""
    values = [getattr(method, field.name) for field in dataclasses.fields(method)]
    return max([getattr(method, "dropout", 0.0), *(dropout_of(one) for one in values if isinstance(one, Method))])


def unfit(model: nn.Module, method: Method, place: Place) -> str | None:
    """Why a method cannot sit at a place, or None."""
    module = model.get_submodule(place.module)
    kind = place.kind
    if is_raw(module, place):
        if not isinstance(method, WeightMethod):
            return f"{place.name} is read as a raw weight, which only a weight-space method can edit"
        layout = raw_weight(module, place)
        if dropout_of(method):
            return f"{place.name} is read as a raw weight, so there is no input to drop out: dropout=0 there"
        if layout.kind == "experts" and method.elastic:
            return f"{place.name} is a stack of matrices, and {type(method).__name__} picks another shape for each"
        if layout.kind == "experts" and not method.stackable:
            return f"{place.name} is a stack of matrices, and {type(method).__name__} keeps only single ones"
        if layout.kind == "experts" and layout.bias(module) is None and type(method).weight is WeightMethod.weight:
            return f"{place.name} has no bias, and {type(method).__name__} edits nothing else"
        return None
    if kind not in method.hosts:
        return f"{place.name} is a {kind} site; {type(method).__name__} supports {listing(sorted(method.hosts))}"
    if isinstance(method, InputMethod) and batches.stack_of(model, place.module) is None:
        return f"{place.name} has no ancestor that takes input_ids, so virtual tokens cannot be added"
    return None


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
    slot = batches.slot_name(name, part.label)
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


class Groups(nn.ModuleDict):
    """What parts share, by slot. It lets a model that is itself an nn.Sequential run through it."""

    def forward(self, x: Any) -> Any:
        return x


def commit(
    model: nn.Module, state: State, adapter: Adapter, work: Sequence[tuple[Part, list[Delta], Group | None]]
) -> None:
    """Install prepared deltas: once sources are known, nothing is refused any more."""
    read = [sources(model, part) for part, *_ in work]
    if not state.adapters:
        state.frozen = {key: value.requires_grad for key, value in model.named_parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.__dict__["_trimtab"] = state
    attentions = any(place.kind == "attention" for part, *_ in work for place in part.places)
    known = places(model) if attentions else []
    for index, (part, deltas, group) in enumerate(work):
        for place, delta, reading in zip(part.places, deltas, read[index], strict=True):
            module = model.get_submodule(place.module)
            key = adapter.name + (f"+{index}" if index else "") + site_key(place)
            stack = batches.stack_of(model, place.module) if reads_batch(part.method) else None
            delta.train(module.training)
            install(module, place, delta, key, state, stack.path if stack else "", place.features or 0)
            if reading is not None:
                listen(model, module._modules["delta"], part.method.source, reading)  # type: ignore[arg-type]
            if place.kind == "attention":
                found: Any = module._modules["delta"]
                found.__dict__["beside"] = projections(known, module, place.module)
                found.__dict__["heads"] = heads_of(module)
            above = ancestors(model, place.module)
            if any(isinstance(outer, nn.TransformerEncoderLayer) for outer in above):
                stand_aside(module)
            for outer in above:
                if isinstance(outer, nn.TransformerEncoder) and outer.use_nested_tensor:
                    outer.use_nested_tensor = False
                    state.padded.append(outer)
        if group is not None:
            if SHARED not in model._modules:
                model.add_module(SHARED, Groups())
            shared: Any = model._modules[SHARED]
            shared[batches.slot_name(adapter.name, part.label)] = group
    state.adapters[adapter.name] = adapter
    state.active = (*state.active, adapter.name)
    state.rows = None
    state.kept.clear()
    wanted = [place.module for part, *_ in work if reads_batch(part.method) for place in part.places]
    if wanted:
        batches.install_hooks(model, state, wanted)


def site_key(place: Place) -> str:
    """What tells the deltas of one part on one module apart: the raw parameter and the part of a fused weight."""
    return (f"/{place.parameter}" if place.parameter else "") + (f":{place.part}" if place.part else "")


def ancestors(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules above a path, outermost first."""
    names = path.split(".")
    return [model.get_submodule(".".join(names[:end])) for end in range(len(names))]


def reads_batch(method: Method) -> bool:
    """Whether a method needs to know positions: virtual tokens, or edits at prompt positions."""
    return isinstance(method, InputMethod) or getattr(method, "reads_batch", False)


def detach(model: nn.Module, name: str | None = None, where: str | None = None) -> nn.Module:
    """Take an adapter (None: all of them) off again: classes, flags and every bit of the base are as before.

    With `where` only off these sites: `detach(model, where="attn@:5, ffn@:5")` prunes the first five layers, and what
    is saved afterwards has the other sites only.
    """
    state = require_state(model, "detach")
    names = list(state.adapters) if name is None else [name]
    check_names(state, names, "detach")
    if where is not None:
        names = prune(model, state, names, where)
    for one in names:
        for _, module in list(edited_modules(model)):
            uninstall(module, one)
        shared: Any = model._modules.get(SHARED, {})
        for key in [key for key in shared if key.startswith(f"{one}/")]:
            del shared[key]
        del state.adapters[one]
    state.active = tuple(other for other in state.active if other in state.adapters)
    state.rows = None
    state.kept.clear()
    if SHARED in model._modules and not len(model._modules[SHARED]):  # type: ignore[arg-type]
        del model._modules[SHARED]
    if not any(reads_batch(part.method) for adapter in state.adapters.values() for part in adapter.parts):
        batches.remove_hooks(state)
    if not state.adapters:
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(state.frozen.get(key, parameter.requires_grad))
        for encoder in state.padded:
            encoder.use_nested_tensor = True
        del model.__dict__["_trimtab"]
    return model


def prune(model: nn.Module, state: State, names: Sequence[str], where: str) -> list[str]:
    """Take adapters off some of their sites; returns those that are left with none."""
    gone: dict[int, list[Place]] = {}
    refusal: UserError | None = None
    parts = [(name, part) for name in names for part in state.adapters[name].parts]
    for index, (name, part) in enumerate(parts):
        try:
            chosen = {place.name for place in select(model, where, kinds=kinds_of(part.method))}
        except UserError as error:
            refusal = UserError(f"detach: {error.message}", fix=error.fix)
            continue
        gone[index] = [place for place in part.places if place.name in chosen]
        if gone[index] and isinstance(part.method, InputMethod):
            raise UserError(
                f"detach: the virtual tokens of {name} go through all layers, so it cannot leave some of them",
                fix=f"trimtab.detach(model, {name!r})",
            )
    if not any(gone.values()):
        has = listing({part.where: None for _, part in parts}, 3)
        raise refusal or UserError(f"detach: {where!r} names no site of {listing(names)}; it is at {has}")
    for index, leaving in gone.items():
        name, part = parts[index]
        slot = batches.slot_name(name, part.label)
        for place in leaving:
            module = model.get_submodule(place.module)
            deltas: Any = module._modules["delta"]
            uninstall(
                module,
                name,
                [key for key, one in deltas.items() if one.slot == slot and key.endswith(site_key(place))],
            )
        part.places = [place for place in part.places if place not in leaving]
        if not part.places:
            state.adapters[name].parts.remove(part)
            shared: Any = model._modules.get(SHARED, {})
            if slot in shared:
                del shared[slot]
    return [name for name in names if not state.adapters[name].parts]


def activate(model: nn.Module, names: str | tuple[str, ...] | list[Any] | None) -> nn.Module:
    """Choose the adapters in use: a name, a tuple (stacked), None (the base alone), or a list of them, one per row.

    Rows of a list run through grouped products where the methods allow it, else through a loop over the adapters. What
    is stacked for the groups is forgotten here, so an adapter whose values were written past autograd's sight (`.data`)
    is read anew after it.
    """
    rearrange(model, names).kept.clear()
    return model


def rearrange(model: nn.Module, names: str | tuple[str, ...] | list[Any] | None) -> State:
    """As `activate`, but what is stacked for grouped rows stays: for loops whose rows come and go."""
    state = require_state(model, "activate")
    per_row: list[tuple[str, ...]] | None = None
    if isinstance(names, list):
        per_row = [_stacked(name) for name in names]
        flat = [name for row in per_row for name in row]
    else:
        flat = list(_stacked(names))
    check_names(state, flat, "activate")
    if per_row is not None:
        raw = [path for path, module in edited_modules(model) if hasattr(module.delta, "layouts")]
        if raw and any(d.adapter in flat for path in raw for d in model.get_submodule(path).delta.values()):  # type: ignore[operator]
            raise UserError(
                f"activate: rows of one batch cannot differ at weights that are read raw: {listing(raw, 4)}",
                fix="activate one adapter for all rows, or leave these sites out of `where`",
            )
        if not per_row:
            raise UserError("activate: an empty list names no row")
        state.rows = per_row
    else:
        state.active, state.rows = tuple(flat), None
    return state


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


def _stacked(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)


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
