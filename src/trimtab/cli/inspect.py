"""`trimtab inspect`: what is in a run or an adapter directory, read without the weights of the model."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from trimtab.cli.curve import curve
from trimtab.cli.verb import Verb, columns, counted, duration, figure, heading, say, share, size
from trimtab.core.errors import UserError, listing

RUN_RECORD, ADAPTER_RECORD, FOREIGN = "run.json", "adapter.json", "adapter_config.json"


@click.command(cls=Verb, name="inspect", short_help="Show what is in a run or an adapter.")
@click.argument("directory", metavar="RUN_OR_ADAPTER", type=click.Path(path_type=Path))
def command(directory: Path) -> dict[str, Any]:
    """Show recipe, data, method, sites, tensors, scores and the loss curve of a run or of an adapter alone."""
    kind = kind_of(directory)
    found: dict[str, Any] = {"kind": kind, "directory": str(directory)}
    losses: list[float] = []
    if kind == "run":
        run, losses = read_run(directory)
        found |= run
        folder = directory / "adapter"
        found["adapter"] = read_adapter(folder) if (folder / ADAPTER_RECORD).is_file() else None
    else:
        found["adapter"] = read_adapter(directory)
    say(text(found, losses))
    return found


def kind_of(directory: Path) -> str:
    """`run` or `adapter`; an error that says what else a directory is."""
    if not directory.is_dir():
        what = "is a file, not a directory" if directory.exists() else "does not exist"
        raise UserError(f"inspect: {directory} {what}", fix=nearby(directory.parent))
    for kind, name in (("run", RUN_RECORD), ("adapter", ADAPTER_RECORD)):
        if (directory / name).is_file():
            return kind
    if (directory / FOREIGN).is_file():
        raise UserError(f"inspect: {directory} holds a PEFT adapter", fix=f"trimtab convert {directory} --out DIR")
    if (directory / "config.json").is_file():
        raise UserError(f"inspect: {directory} is a model, not a run or an adapter", fix=nearby(directory.parent))
    raise UserError(
        f"inspect: {directory} is neither a run (no {RUN_RECORD}) nor an adapter (no {ADAPTER_RECORD})",
        fix=nearby(directory),
    )


def nearby(folder: Path) -> str:
    """Runs and adapters one level below a folder, or how to make one."""
    roots = [folder, Path("runs")] if folder.is_dir() else [Path("runs")]
    names = (RUN_RECORD, ADAPTER_RECORD)
    found = dict.fromkeys(str(one.parent) for root in roots for name in names for one in sorted(root.glob(f"*/{name}")))
    return f"nearby: {listing(found, 5)}" if found else "`trimtab tune` makes a run"


def read_run(directory: Path) -> tuple[dict[str, Any], list[float]]:
    """Recipe and record of a run as plain data, and its training losses."""
    from trimtab.train.rundir import open_run

    run = open_run(directory)
    if not isinstance(run.record, Mapping):
        raise UserError(f"inspect: {directory / RUN_RECORD} is damaged: it holds no object")
    losses = [float(line["loss"]) for line in run.metrics if isinstance(line.get("loss"), int | float)]
    recipe = {key: dict(value) if isinstance(value, Mapping) else value for key, value in vars(run.recipe).items()}
    return {"recipe": recipe, **run.record, "steps_done": len(losses)}, losses


def read_adapter(folder: Path) -> dict[str, Any]:
    """Methods, sites and tensors of an adapter; the tensors are read as shapes only."""
    from trimtab.core.save import TENSORS, place_of, read_record

    record = read_record(folder)
    shapes = tensor_shapes(folder / TENSORS)
    parts = []
    try:
        for part in record["parts"]:
            prefix = f"{part['label']}."
            mine = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
            places = [place_of(site) for site in part["sites"]]
            roles = Counter(place.role or place.name.rsplit(".", 1)[-1] for place in places)
            parts.append(
                {
                    "label": part["label"],
                    "method": part["method"],
                    "where": part["where"],
                    "sites": len(part["sites"]),
                    "roles": dict(roles),
                    "tensors": grouped(mine, [place.name for place in places]),
                    "values": sum(map(math.prod, mine.values())),
                }
            )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"inspect: {folder / ADAPTER_RECORD} is damaged: {error!r}") from None
    return {
        "name": record.get("name"),
        "seed": record.get("seed"),
        "base": record.get("base"),
        "notes": record.get("notes"),
        "bytes": sum(one.stat().st_size for one in folder.iterdir() if one.is_file()),
        "parts": parts,
    }


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Key -> shape of a safetensors file, from its header alone."""
    try:
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= path.stat().st_size - 8:
                raise ValueError("its header does not fit in it")
            header = json.loads(stream.read(length))
        entries = {key: entry for key, entry in header.items() if key != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if 8 + length + end != path.stat().st_size:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, its header says {8 + length + end:,}")
        return {key: tuple(entry["shape"]) for key, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"inspect: {path} cannot be read: {error}", fix="save the adapter again") from None


def grouped(shapes: Mapping[str, tuple[int, ...]], sites: list[str]) -> list[dict[str, Any]]:
    """Tensors of the same name and shape at different sites as one entry with a count."""
    counts: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for key, shape in shapes.items():
        site = max((name for name in sites if key.startswith(f"{name}.")), key=len, default="")
        counts[key.removeprefix(f"{site}."), shape] += 1
    return [{"name": name, "shape": list(shape), "count": count} for (name, shape), count in counts.items()]


def text(found: Mapping[str, Any], losses: list[float]) -> str:
    """The document for people."""
    blocks = []
    adapter = found.get("adapter")
    if found["kind"] == "run":
        blocks.append(run_text(found))
    if adapter is None:
        blocks.append(f"no adapter: the run is {found.get('status', 'unfinished')}")
    else:
        blocks.append(adapter_text(adapter, found))
    if losses:
        blocks.append(heading("training loss") + "\n" + curve(losses))
    return "\n\n".join(blocks)


def run_text(found: Mapping[str, Any]) -> str:
    """Recipe, data, scores, cost and versions of a run."""
    recipe, data, model = found["recipe"], found.get("data") or {}, found.get("model") or {}
    before, after = found.get("before") or {}, found.get("after") or {}
    fingerprint = str(model.get("fingerprint", "unknown"))
    facts = [
        ("model", f"{recipe['model']} ({model.get('class', '?')}, {model.get('parameters', 0):,} parameters)"),
        ("base", f"sha256 {fingerprint[:16]}"),
        (
            "data",
            f"{recipe['data']}: {data.get('form', '?')} form, {data.get('train_rows', '?')} training rows, "
            f"{data.get('heldout_rows', '?')} held out, sha256 {str(data.get('sha256', 'unknown'))[:16]}",
        ),
        *(("", str(line)) for line in data.get("sources", [])),
        ("task", str(found.get("task", recipe["task"]))),
        ("training", training(found)),
        ("seed", str(recipe["seed"])),
    ]
    if recipe.get("quantize"):
        facts.insert(1, ("kept as", str(recipe["quantize"])))
    if found.get("seconds") is not None:
        memory = size(found.get("peak_memory_bytes"))
        facts.append(
            ("cost", f"{duration(found['seconds'])}, {found['rows_per_second']:.3g} rows/s, peak memory {memory}")
        )
    facts.append(
        ("versions", ", ".join(f"{name} {version}" for name, version in (found.get("versions") or {}).items()))
    )
    title = heading(f"run {found['directory']}") + f" ({found.get('status', 'unknown status')})"
    blocks = [title + "\n" + columns(facts)]
    if before:
        rows = [
            (name, figure(value), figure(after.get(name, "-")))
            for name, value in before.items()
            if isinstance(value, float)
        ]
        blocks.append(columns([("held out", "before", "after"), *rows], right=(1, 2)))
    return "\n\n".join(blocks)


def training(found: Mapping[str, Any]) -> str:
    """Steps, batch and learning rate of a run in one line."""
    recipe = found["recipe"]
    steps = found.get("steps", "?")
    done = found["steps_done"]
    progress = f"{steps} steps" if done == steps else f"{done} of {steps} steps"
    rows = recipe["batch_size"] * recipe["accumulation"]
    rate = found.get("learning_rate") or recipe["learning_rate"]
    return f"{progress} of {rows} rows, learning rate {figure(rate)} ({recipe['schedule']})"


def adapter_text(adapter: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Parts, sites, tensors and size of an adapter."""
    lines = [heading(f"adapter {adapter['name']}") + f" for {(adapter.get('base') or {}).get('class', 'unknown')}"]
    for part in adapter["parts"]:
        method = part["method"]
        roles = ", ".join(f"{role} {count}" for role, count in part["roles"].items())
        lines.append(f"  {setting_text(method)} at {part['where']!r}: {counted(part['sites'], 'site')} ({roles})")
        shapes = [
            (one["name"], "x".join(map(str, one["shape"])) or "scalar", f"at {counted(one['count'], 'site')}")
            for one in sorted(part["tensors"], key=lambda one: str(one["name"]))
        ]
        lines.append(columns(shapes, indent=4))
    prompt = (adapter.get("notes") or {}).get("prompt")
    if prompt is not None:
        lines.append(f"  its tokens read {prompt!r}")
    stored = sum(part["values"] for part in adapter["parts"])
    trained = f"{stored:,} values stored"
    part, whole = found.get("trainable"), found.get("total")
    if part and whole:
        trained = f"{part:,} of {whole:,} parameters trained ({share(part, whole)})"
    return "\n".join([*lines, f"  {trained}, {size(adapter['bytes'])} on disk"])


def setting_text(method: Any) -> str:
    """A method with its settings: `lora(rank=8, alpha=16.0)`."""
    if not isinstance(method, Mapping):
        return str(method)
    kind = next((key for key in ("methods", "storage", "start") if key in method), None)
    settings = ", ".join(f"{key}={setting_text(value)}" for key, value in method.items() if key != kind)
    return f"{method[kind]}({settings})" if kind else "{" + settings + "}"
