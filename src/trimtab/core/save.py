"""An adapter on disk: `adapter.safetensors` with its own tensors only, and `adapter.json` that describes them.

Keys are `<part>.<site>.<tensor>`, for example `lora.model.layers.0.self_attn.q_proj.A`. Writing is atomic; reading is
strict: every missing, extra or misshaped key and every site the model lacks is listed in one error, and nothing is
changed then.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.attach import SHARED, commit
from trimtab.core.delta import Delta, Group, build
from trimtab.core.draw import drawing, dtype_and_device, init_at, site_at
from trimtab.core.errors import UserError, listing, nearest
from trimtab.core.files import sha256_of, write_together
from trimtab.core.format import Format
from trimtab.core.part import unfit
from trimtab.core.places import Place
from trimtab.core.quantized import check_modules
from trimtab.core.registry import from_json, name_of, to_json
from trimtab.core.rounded import Rounded
from trimtab.core.rows import Rows
from trimtab.core.site import OpaqueBase, RawBase, Site
from trimtab.core.stack import slot_name
from trimtab.core.state import Adapter, Part, State, check_names, require_state, state_of
from trimtab.core.swap import below, made
from trimtab.core.taken import Taken, encode_rest, products, same_branch
from trimtab.core.tensor_file import write_tensors

TENSORS, RECORD = "adapter.safetensors", "adapter.json"
VERSION = 1


def save(
    model: nn.Module,
    directory: str | Path,
    name: str = "default",
    *,
    bake: bool = False,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Write one adapter to a directory, which is made if needed; `notes` (plain data) are kept in the record.

    With `bake`, what only training needs is left out (the network that makes a prefix): the file computes the same, is
    small, and trains on as what it holds. Without it training goes on exactly.

    Both files are complete on disk before either takes its final name, so a full disk or a kill leaves the old ones.
    In a sharded model every process has to call this; tensors are gathered, and the first process writes.
    """
    state = require_state(model, "save")
    check_names(state, [name], "save")
    target = Path(directory)
    adapter = state.adapters[name]
    adapter, held = baked(model, adapter) if bake else (adapter, adapter_tensors(model, name))
    tensors = {key: whole(value.detach()) for key, value in held.items()}
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
        return target
    write_adapter(target, describe(model, adapter), tensors, notes or {})
    return target


def write_adapter(
    directory: Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor], notes: Mapping[str, Any]
) -> None:
    """Both files of an adapter, or none."""
    told: dict[str, Any] = {}

    def put_tensors(path: Path) -> None:
        told["sha256"] = write_tensors(path, tensors, {"format": "pt"})

    def put_record(path: Path) -> None:
        text = json.dumps({**record, **told, "notes": dict(notes)}, indent=1, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")

    write_together(directory, {TENSORS: put_tensors, RECORD: put_record})


def whole(value: Tensor) -> Tensor:
    """A tensor gathered from the processes it is sharded over, if it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


@torch.no_grad()
def baked(model: nn.Module, adapter: Adapter) -> tuple[Adapter, dict[str, Tensor]]:
    """The adapter without what only training needs, and its tensors by their keys in the file."""
    state = require_state(model, "save")
    tensors, parts = adapter_tensors(model, adapter.name), []
    for part in adapter.parts:
        slot = slot_name(adapter.name, part.label)
        group: Any = model._modules.get(SHARED)
        shared = gathered(group[slot]) if group is not None and slot in group else None
        done = []
        for delta in deltas_of(model, state, adapter.name, part):
            p = gathered(delta)
            p.__dict__["shared"] = shared
            done.append(part.method.bake(p))
        methods = {one[0] for one in done if one is not None}
        if len(methods) != 1 or None in done:
            parts.append(part)
            continue
        label = name_of(type(next(iter(methods))))
        taken = {one.label for one in adapter.parts if one is not part} | {one.label for one in parts}
        label = part.label if label in taken else label
        parts.append(dataclasses.replace(part, method=next(iter(methods)), label=label))
        tensors = {key: value for key, value in tensors.items() if not key.startswith(f"{part.label}.")}
        for place, one in zip(part.places, done, strict=True):
            if one is not None:
                tensors |= {f"{label}.{place.name}.{key}": value for key, value in one[1].items()}
    return dataclasses.replace(adapter, parts=parts), tensors


def gathered(group: Group) -> Any:
    """The tensors of a group, whole where they are sharded, read by attribute as it is."""
    made = Group({})
    for name, value in [*group._parameters.items(), *group._buffers.items()]:
        made.register_buffer(name, None if value is None else whole(value.detach()))
    for name, inner in group._modules.items():
        made.add_module(name, gathered(inner) if isinstance(inner, Group) else inner)
    return made


def adapter_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Every tensor of an adapter by its key in the file."""
    found: dict[str, Tensor] = {}
    for prefix, holder, _ in holders(model, name):
        found |= {prefix + key: value for key, value in holder.state_dict().items()}
    return found


def holders(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, Part]]:
    """Whatever holds tensors of an adapter: the start of their keys in the file, the module, its part."""
    state = require_state(model, "save")
    check_names(state, [name], "save")
    for part in state.adapters[name].parts:
        for place, delta in zip(part.places, deltas_of(model, state, name, part), strict=True):
            yield f"{part.label}.{place.name}.", delta, part
        group: Any = model._modules.get(SHARED)
        slot = slot_name(name, part.label)
        if group is not None and slot in group:
            yield f"{part.label}.@shared.", group[slot], part


def overwrite(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Overwrite every tensor of an adapter in place; an elastic one takes the shape it is given."""
    with torch.no_grad():
        for prefix, holder, part in holders(model, name):
            for key, value in holder.state_dict(keep_vars=True).items():
                given = tensors[prefix + key]
                if value.shape != given.shape and key in part.method.elastic:
                    value.data = given.to(value, copy=True)
                else:
                    value.copy_(given)


def deltas_of(model: nn.Module, state: State, name: str, part: Part) -> list[Delta]:
    """The delta of a part at each of its places."""
    slot = slot_name(name, part.label)
    found = []
    for place in part.places:
        deltas: Any = model.get_submodule(place.module)._modules["delta"]
        found.append(
            next(
                delta
                for key, delta in deltas.items()
                if delta.slot == slot
                and delta.rows == place.rows
                and (place.parameter is None or deltas.layouts[key].name == place.parameter)
            )
        )
    return found


def describe(model: nn.Module, adapter: Adapter) -> dict[str, Any]:
    """The record of an adapter: methods, sites with their shapes, and what it was trained on."""
    state = require_state(model, "save")
    parts = []
    for part in adapter.parts:
        sites = []
        for place in part.places:
            sites.append(entry_of(place) | {"shape": list(site_at(model, state, place).base.shape)})
        encoded = {"quantized": to_json(part.format)} if part.format is not None else {}
        entry = {"label": part.label, "method": to_json(part.method), "where": part.where}
        parts.append({**entry, **encoded, "sites": sites})
    config = getattr(model, "config", None)
    return {
        "format": "trimtab-adapter",
        "version": VERSION,
        "name": adapter.name,
        "seed": adapter.seed,
        "base": {"class": plain_class(model), "model_type": getattr(config, "model_type", None)},
        "parts": parts,
    }


def plain_class(model: nn.Module) -> str:
    """The class a model had before anything was swapped, or sharded: FSDP2 makes a class of its own and the model's."""
    cls: Any = type(model)
    while True:
        if made(cls) is not None:
            cls = below(cls)
        elif cls.__bases__[0].__name__ == "FSDPModule":
            cls = cls.__bases__[1]
        else:
            return str(cls.__name__)


def read_record(directory: str | Path) -> dict[str, Any]:
    """`adapter.json` of a directory, checked for being one."""
    folder = Path(directory)
    path = folder / RECORD
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"load: {folder} holds a PEFT adapter", fix="trimtab.load reads it, and trimtab convert")
        beside = [str(found.parent) for found in sorted(folder.glob(f"*/{RECORD}"))] if folder.is_dir() else []
        raise UserError(f"load: no {RECORD} in {folder}", fix=f"did you mean {listing(beside, 3)}?" if beside else None)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"load: {path} cannot be read: {error}") from None
    if not isinstance(record, dict) or record.get("format") != "trimtab-adapter":
        raise UserError(f"load: {path} is not the record of a trimtab adapter")
    if record.get("version", 0) > VERSION:
        raise UserError(
            f"load: {path} is version {record['version']}, this program reads up to {VERSION}", fix="upgrade trimtab"
        )
    return record


def load(model: nn.Module, directory: str | Path, name: str | None = None, *, trainable: bool = True) -> nn.Module:
    """Attach a saved adapter, bit for bit, under its own name or `name`; returns the model.

    Nothing is drawn or decomposed again. With `trainable=False` its tensors do not ask for gradients.
    """
    record = read_record(directory)
    return attach_saved(model, record, read_tensors(Path(directory), record), directory, name, trainable=trainable)


def attach_saved(
    model: nn.Module,
    record: Mapping[str, Any],
    blob: Mapping[str, Tensor],
    directory: str | Path,
    name: str | None = None,
    *,
    trainable: bool = True,
) -> nn.Module:
    """As `load`, from a record and tensors in memory; `directory` is where they came from, for messages."""
    state = state_of(model) or State()
    adapter = Adapter(name or record["name"], record["seed"], [])
    if adapter.name in state.adapters:
        raise UserError(f"load: an adapter named {adapter.name!r} is attached already", fix="pass another name=")
    problems: list[str] = []
    work = []
    used: set[str] = set()
    for entry in record["parts"]:
        places = [place_of(one) for one in entry["sites"]]
        part = Part(
            from_json(entry["method"]), entry["where"], entry["label"], places, from_json(entry.get("quantized"))
        )
        shapes = [tuple(one["shape"]) for one in entry["sites"]]
        wrong = misfits(model, part, shapes)
        if wrong:
            problems += wrong
            used |= {key for key in blob if key.startswith(f"{part.label}.")}
            continue
        deltas, group = outline(model, part, adapter, shapes)
        holders = [(f"{part.label}.{place.name}.", delta) for place, delta in zip(part.places, deltas, strict=True)]
        if group is not None:
            holders.append((f"{part.label}.@shared.", group))  # type: ignore[arg-type]
        for prefix, holder in holders:
            for key, expected in holder.state_dict().items():
                used.add(prefix + key)
                found = blob.get(prefix + key)
                if found is None:
                    problems.append(f"missing {prefix + key} {tuple(expected.shape)}")
                elif found.shape != expected.shape and key not in part.method.elastic:
                    problems.append(f"{prefix + key} has shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
                else:
                    put(holder, key, found, model, trainable)
        adapter.parts.append(part)
        work.append((part, deltas, group))
    problems += [f"unexpected {key} {tuple(blob[key].shape)}" for key in blob if key not in used]
    if problems:
        found_class, saved = plain_class(model), record["base"]["class"]
        raise UserError(
            f"load: {directory} does not fit this {found_class} ({len(problems)} problems):\n    "
            + "\n    ".join(problems),
            fix=None if found_class == saved else f"it was saved from a {saved}",
        )
    encoded = [(part, deltas) for part, deltas, _ in work]
    refuse_other_codes(model, products(model, encoded), directory)
    encode_rest(model, encoded)
    for deltas, place in ((item[1], place) for item in work for place in item[0].places[:1]):
        kind, _device = dtype_and_device(model, place)
        for delta in deltas:
            stored = next((p.dtype for p in delta.parameters() if p.is_floating_point()), kind)
            delta.master = stored != kind
    commit(model, state, adapter, work)
    return model


def refuse_other_codes(model: nn.Module, wanted: Mapping[str, tuple[Format, list[Taken]]], directory: Any) -> None:
    """An adapter whose start was taken out of the weights before they were encoded needs these codes, or dense ones."""
    modules = {path: model.get_submodule(path) for path in wanted}
    coded = [path for path, module in modules.items() if "code" in module._modules]
    other = [path for path in coded if not same_branch(modules[path], *wanted[path])]
    if other:
        raise UserError(
            f"load: {directory} was started on weights encoded without a part of them, but {listing(other, 3)} "
            "are quantized as a whole",
            fix="load it on the dense model: it quantizes its sites itself",
        )
    for format in dict.fromkeys(format for format, _ in wanted.values()):
        dense = [path for path in wanted if wanted[path][0] == format and path not in coded]
        check_modules(model, dense, format)


def read_tensors(folder: Path, record: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors file of an adapter, checked against the checksum in its record."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / TENSORS
    try:
        if sha256_of(path) != record.get("sha256"):
            raise UserError(f"load: {path} is damaged: its checksum is not the one in {RECORD}")
        return {key: value.clone() for key, value in load_file(path).items()}  # aligned, and no longer the file's pages
    except (OSError, SafetensorError) as error:
        raise UserError(f"load: {path} cannot be read: {error}") from None


def entry_of(place: Place) -> dict[str, Any]:
    """A Place as JSON: what it has, its rows as [start, stop] or, where they are some of every head, with the heads."""
    values = {field.name: getattr(place, field.name) for field in dataclasses.fields(place)}
    if place.rows is not None:
        start, stop, groups = dataclasses.astuple(place.rows)
        values["rows"] = [start, stop, groups] if groups > 1 else [start, stop]
    return {key: value for key, value in values.items() if value is not None and value is not False}


def place_of(entry: Mapping[str, Any]) -> Place:
    """A Place from its JSON."""
    known = {field.name for field in dataclasses.fields(Place)}
    values: dict[str, Any] = {
        key: Rows(*value) if key == "rows" else value for key, value in entry.items() if key in known
    }
    return Place(**values)


def misfits(model: nn.Module, part: Part, shapes: list[tuple[int, ...]]) -> list[str]:
    """What is wrong with putting a part on this model: modules it lacks, other shapes, unsupported kinds."""
    problems = []
    modules = dict(model.named_modules())
    for place, shape in zip(part.places, shapes, strict=True):
        module = modules.get(place.module)
        if module is None or (place.parameter is not None and place.parameter not in module._parameters):
            close = nearest(place.module, modules, 1)
            problems.append(f"no site {place.name} in the model" + (f" (nearest: {close[0]})" if close else ""))
            continue
        problem = unfit(model, part.method, place)
        if problem:
            problems.append(problem)
            continue
        found = tuple(site_at(model, State(), place).base.shape)
        if found != shape:
            problems.append(f"{place.name} is {found} (out, in), the adapter was made for {shape}")
    return problems


def outline(
    model: nn.Module, part: Part, adapter: Adapter, shapes: list[tuple[int, ...]]
) -> tuple[list[Delta], Group | None]:
    """The deltas of a part with meta tensors: the structure `init` would give, without drawing anything."""
    meta = torch.device("meta")
    sites = []
    for index, (place, shape) in enumerate(zip(part.places, shapes, strict=True)):
        real = site_at(model, State(), place, index)
        kind, _ = dtype_and_device(model, place)
        experts = real.base.weight.shape if isinstance(real.base, RawBase) else shape
        b = None if isinstance(real.base, OpaqueBase) else real.base.bias
        b = None if b is None else torch.empty_like(b, device=meta)
        sites.append(Site(**{**vars(real), "base": RawBase(torch.empty(experts, dtype=kind, device=meta), b)}))
    with torch.no_grad(), drawing(0, "outline", meta):
        drawn = part.method.shared(sites)
        group = Group(build(drawn, dtype=torch.float32, device=meta)) if drawn else None
        deltas = []
        for site, place in zip(sites, part.places, strict=True):
            site.shared = group
            tensors = build(init_at(part.method, site, place, model), dtype=torch.float32, device=meta)
            slot = slot_name(adapter.name, part.label)
            delta = Delta(part.method, tensors, adapter=adapter.name, slot=slot, rows=place.rows)
            delta.share(group)
            deltas.append(delta)
    return deltas, group


def put(holder: nn.Module, key: str, value: Tensor, model: nn.Module, trainable: bool) -> None:
    """Replace one meta tensor of an outlined group by the saved one."""
    *path, last = key.split(".")
    owner = holder.get_submodule(".".join(path))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    old = owner._parameters.get(last)
    if old is not None and not value.numel():
        del owner._parameters[last]
        owner.register_buffer(last, value.to(device))
    elif old is not None:
        owner._parameters[last] = nn.Parameter(value.to(device), requires_grad=old.requires_grad and trainable)
    else:
        owner._buffers[last] = value.to(device)
        if isinstance(owner, Rounded):
            owner.renew(trainable)
