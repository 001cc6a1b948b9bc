"""Checkpoints of a run: everything the loop needs to go on as if it had never stopped.

`checkpoints/step-00000120/` holds `state.safetensors` (the adapter's tensors, optimizer state, random generators, the
best adapter so far) and `state.json` (step, counters, sha256 of the other). A checkpoint is complete on disk before it
takes its name; a damaged one is passed over for the one before it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.files import flush, sha256_of
from trimtab.core.save import adapter_tensors, overwrite
from trimtab.core.tensor_file import write_tensors
from trimtab.engine.ranks import ALONE, Ranks

FOLDER, TENSORS, RECORD = "checkpoints", "state.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """The state of the loop between two steps."""

    step: int
    counters: dict[str, Any]
    """What the loop counts besides: rows seen, seconds, the best held-out loss."""
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds, in memory."""

    step: int
    record: dict[str, Any]
    tensors: dict[str, Tensor]
    """Those of the run itself, where it has them, unless they were copied."""

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self.tensors.values())

    def copied(self) -> Snapshot:
        """The same on the CPU, which later steps do not change."""
        return replace(self, tensors={key: value.to("cpu", copy=True) for key, value in self.tensors.items()})


def snapshot(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    counters: Mapping[str, Any],
    best: Mapping[str, Tensor],
) -> Snapshot:
    """The state after `step` steps."""
    tensors = {f"adapter.{key}": value.detach() for key, value in adapter_tensors(model, "default").items()}
    tensors |= {f"best.{key}": value for key, value in best.items()}
    numbers: dict[str, Any] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                numbers[f"{index}.{key}"] = value
    tensors |= {f"random.{device}": state for device, state in random_states()}
    held = {key: value.detach() for key, value in tensors.items()}
    return Snapshot(step, {"step": step, "counters": dict(counters), "optimizer": numbers}, held)


def store(run: Path, made: Snapshot, keep: int = 2) -> None:
    """Write a snapshot and remove all but the newest `keep` checkpoints; a full disk leaves those that were there."""
    folder = run / FOLDER
    final, pending = folder / f"step-{made.step:08d}", folder / f".step-{made.step:08d}.partial"
    shutil.rmtree(pending, ignore_errors=True)
    try:
        pending.mkdir(parents=True)
        record = made.record | {"sha256": write_tensors(pending / TENSORS, made.tensors)}
        (pending / RECORD).write_text(json.dumps(record), encoding="utf-8")
        for path in (pending / TENSORS, pending / RECORD, pending):
            flush(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(pending, final)
        flush(folder)
    except OSError as error:
        shutil.rmtree(pending, ignore_errors=True)
        raise UserError(
            f"save: could not write {made.nbytes:,} bytes to {final}: {error.strerror or error}",
            fix="free some space or choose another directory; what was there before is unchanged",
        ) from None
    for old in found(run)[keep:]:
        shutil.rmtree(old, ignore_errors=True)


def newest(run: Path, ranks: Ranks = ALONE) -> tuple[Checkpoint | None, list[str]]:
    """The newest intact checkpoint of a run (None: there is none), and what was wrong with newer ones.

    The first process reads it; the others, on other machines perhaps, are handed it.
    """
    if ranks.size == 1:
        return newest_here(run)
    saved, problems = newest_here(run) if ranks.first else (None, [])
    found = ranks.told(lambda: [saved and saved.step, saved and saved.counters, problems])
    blob = ranks.handed(lambda: as_bytes(saved))
    return None if found[0] is None else Checkpoint(found[0], found[1], from_bytes(blob)), found[2]


def as_bytes(saved: Checkpoint | None) -> bytes:
    """The tensors and numbers of a checkpoint as one block."""
    from safetensors.torch import save

    held = saved.tensors if saved is not None else {}
    numbers = {key: value for key, value in held.items() if not isinstance(value, Tensor)}
    tensors = {key: value.contiguous() for key, value in held.items() if isinstance(value, Tensor)}
    text = json.dumps(numbers).encode()
    return len(text).to_bytes(8, "little") + text + save(tensors)


def from_bytes(blob: bytes) -> dict[str, Any]:
    """The inverse of `as_bytes`."""
    from safetensors.torch import load

    end = 8 + int.from_bytes(blob[:8], "little")
    return {**json.loads(blob[8:end]), **load(blob[end:])}


def newest_here(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """As `newest`, for one process."""
    problems: list[str] = []
    for folder in found(run):
        try:
            return read(folder), problems
        except (OSError, ValueError, KeyError) as error:
            problems.append(f"{folder.name} is damaged ({error}), using an earlier one")
    return None, problems


def read(folder: Path) -> Checkpoint:
    """One checkpoint; raises ValueError when its content is not what was written."""
    from safetensors.torch import load_file

    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    if sha256_of(folder / TENSORS) != record["sha256"]:
        raise ValueError("checksum differs")
    tensors: dict[str, Any] = {key: value.clone() for key, value in load_file(folder / TENSORS).items()}
    for key, value in record["optimizer"].items():
        tensors[f"optimizer.{key}"] = value
    return Checkpoint(int(record["step"]), record["counters"], tensors)


def restore(saved: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Put a checkpoint's state into the model, the optimizer and the random generators; returns the best adapter."""
    put(model, part(saved.tensors, "adapter"))
    state: dict[int, dict[str, Any]] = {}
    for key, value in part(saved.tensors, "optimizer").items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    lay_out_alike(optimizer)
    for device, known in part(saved.tensors, "random").items():
        if device == "cpu":
            torch.set_rng_state(known)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(known, int(device.removeprefix("cuda")))
    return part(saved.tensors, "best")


def lay_out_alike(optimizer: torch.optim.Optimizer) -> None:
    """Give state the strides of its parameter: torch's fused kernels pair entries by their place in memory."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[key] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def put(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Overwrite the adapter's tensors in place; every one of them must be there."""
    own = adapter_tensors(model, "default")
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())
        raise UserError(f"checkpoint: it is of another adapter ({len(odd)} keys differ, first {odd[0]})")
    overwrite(model, "default", tensors)


def taken(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the adapter's tensors as they are now."""
    return {key: value.detach().clone() for key, value in adapter_tensors(model, "default").items()}


def part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The entries under `name.`, without it."""
    return {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(name + ".")}


def found(run: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    folder = run / FOLDER
    return sorted(folder.glob("step-*"), reverse=True) if folder.is_dir() else []


def clear(run: Path) -> None:
    """Remove all checkpoints of a run."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)


def random_states() -> Iterator[tuple[str, Tensor]]:
    """The states of torch's generators, by device."""
    yield "cpu", torch.get_rng_state()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            yield f"cuda{index}", state
