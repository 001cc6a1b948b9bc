"""A block that keeps its input only, and runs again in backward: one node of the graph, whatever it computes inside.

torch's own checkpoint leaves a node for every operation of the first run. They are small, but each of them pins the
heap between the large tensors of the block, so that those of the next block do not fit where they lay: on a CPU the
gaps took five times the memory that is kept on purpose. Here the first run leaves nothing behind.

Gradients reach parameters, and tensors among the arguments. What a block reads from outside that is the result of a
computation itself (a network that several blocks share) would have its graph walked once a block, which torch refuses.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from trimtab.core.errors import UserError
from trimtab.data.packing import Bag, Segment

LEAST = 1 << 16
"""Bytes below which a tensor is not worth a place of its own."""
PLAIN = (str, int, float, type(None), torch.dtype, torch.device, Segment, Bag)


class Place(Protocol):
    """Where kept inputs wait for backward."""

    def put(self, tensor: Tensor) -> Any:
        """What is held in place of a tensor."""

    def get(self, held: Any) -> Tensor:
        """The tensor again."""


@dataclass
class Shelf:
    """One piece of memory for the inputs of all blocks of a forward pass.

    Each in a piece of its own, they would lie scattered over the heap. A view is held for each, and the memory lives as
    long as one of them. Inputs come in the order of the blocks; one of another shape begins a new piece.
    """

    blocks: int
    room: Tensor | None = None
    filled: int = 0

    def put(self, tensor: Tensor) -> Tensor:
        if self.room is None or self.room.shape[1:] != tensor.shape or self.room.dtype != tensor.dtype:
            self.room, self.filled = tensor.new_empty(self.blocks, *tensor.shape), 0
        kept = self.room[self.filled].data.copy_(tensor)  # a count of changes of its own, for autograd
        self.filled += 1
        if self.filled == self.blocks:
            self.room = None
        return kept

    def get(self, held: Tensor) -> Tensor:
        return held


class Parked:
    """A tensor in a file that goes away with this object."""

    def __init__(self, tensor: Tensor, folder: str) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        try:
            handle, self.path = tempfile.mkstemp(dir=folder, suffix=".safetensors")
            os.close(handle)
            save_file({"x": tensor.detach().contiguous()}, self.path)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"checkpointing: offload could not write {tensor.nbytes:,} bytes to {folder}: {reason}",
                fix="free some space, name another folder in TMPDIR, or take checkpointing: block",
            ) from None
        weakref.finalize(self, Path(self.path).unlink, missing_ok=True)

    def tensor(self) -> Tensor:
        from safetensors.torch import load_file

        return load_file(self.path)["x"]


@dataclass(frozen=True)
class Disk:
    """A folder, one file for each input."""

    folder: str

    def put(self, tensor: Tensor) -> Parked:
        return Parked(tensor, self.folder)

    def get(self, held: Parked) -> Tensor:
        return held.tensor()


class PinnedHost:
    """Pinned memory of the host, for inputs that are on an accelerator."""

    def put(self, tensor: Tensor) -> tuple[torch.device, Tensor]:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return tensor.device, host.copy_(tensor, non_blocking=True)

    def get(self, held: tuple[torch.device, Tensor]) -> Tensor:
        return held[1].to(held[0], non_blocking=True)


class Keeper(Protocol):
    """What is kept of a first run besides its arguments, for the second."""

    def first(self) -> AbstractContextManager[Callable[[], Any]]:
        """The first run goes on inside; what is yielded returns what is kept, when it is over."""

    def again(self, kept: Any) -> AbstractContextManager[Any]:
        """The second run goes on inside."""


def rerun(
    run: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    place: Place | None = None,
    keeper: Keeper | None = None,
) -> Any:
    """`run(*args, **kwargs)`, of which only tensor arguments are kept, the first one in `place`; gradients are equal.

    Memory: the tensor arguments, and what `keeper` keeps. Time: one more forward, less what `keeper` spares. `run`
    returns tensors, alone or in tuples, lists and dicts. Random numbers are those of the first run. A second derivative
    cannot be taken.
    """
    tensors: list[Tensor] = []
    structure, shape = taken_apart((args, kwargs), tensors), list[Any]()
    trigger = torch.empty(0, requires_grad=True)  # parameters get their gradients though no input may need one
    outputs = _Rerun.apply(run, structure, shape, place, keeper, trigger, *tensors)
    return put_together(shape[0], outputs)


def can_rerun(args: Any) -> bool:
    """Whether arguments are tensors and plain values, in tuples, lists and dicts: an object could hide a graph."""
    if isinstance(args, dict):
        return all(map(can_rerun, args.values()))
    if type(args) in (tuple, list):
        return all(map(can_rerun, args))
    return isinstance(args, (Tensor, *PLAIN))


@dataclass(frozen=True)
class Slot:
    """Where a tensor was."""

    index: int


def taken_apart(thing: Any, tensors: list[Tensor]) -> Any:
    """The same structure with slots for its tensors, which are added to the list."""
    if isinstance(thing, Tensor):
        tensors.append(thing)
        return Slot(len(tensors) - 1)
    if isinstance(thing, dict):
        return {key: taken_apart(value, tensors) for key, value in thing.items()}
    if type(thing) in (tuple, list):
        return type(thing)(taken_apart(value, tensors) for value in thing)
    return thing


def put_together(structure: Any, tensors: Any) -> Any:
    """The structure with these tensors in its slots."""
    if isinstance(structure, Slot):
        return tensors[structure.index]
    if isinstance(structure, dict):
        return {key: put_together(value, tensors) for key, value in structure.items()}
    if type(structure) in (tuple, list):
        return type(structure)(put_together(value, tensors) for value in structure)
    return structure


class _Rerun(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Any,
        structure: Any,
        shape: list[Any],
        place: Place | None,
        keeper: Keeper | None,
        _: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.run, ctx.structure, ctx.place, ctx.count = run, structure, None, len(tensors)
        ctx.random, ctx.devices = torch.get_rng_state(), get_device_states(*tensors)
        first, *rest = tensors
        if place is not None and first.is_floating_point() and first.nbytes >= LEAST:
            held = place.put(first.detach())
            ctx.place, ctx.held = place, None if isinstance(held, Tensor) else held
            rest = [held, *rest] if isinstance(held, Tensor) else rest
        else:
            rest = [first, *rest]
        ctx.save_for_backward(*rest)
        args, kwargs = put_together(structure, tensors)
        outputs: list[Tensor] = []
        ctx.keeper = keeper
        with nullcontext(lambda: None) if keeper is None else keeper.first() as kept:
            shape.append(taken_apart(run(*args, **kwargs), outputs))
        ctx.kept = kept()
        ctx.mark_non_differentiable(*(one for one in outputs if not one.is_floating_point()))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        if len(saved) < ctx.count:
            saved.insert(0, ctx.place.get(ctx.held))
        needed = ctx.needs_input_grad[-ctx.count :]
        inputs = [one.detach().requires_grad_(need) for one, need in zip(saved, needed, strict=True)]
        args, kwargs = put_together(ctx.structure, inputs)
        outputs: list[Tensor] = []
        ids, states = ctx.devices
        with torch.random.fork_rng(devices=ids), torch.enable_grad():
            torch.set_rng_state(ctx.random)
            set_device_states(ids, states)
            with nullcontext() if ctx.keeper is None else ctx.keeper.again(ctx.kept):
                taken_apart(ctx.run(*args, **kwargs), outputs)
        ctx.kept = None
        pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
        if pairs:
            torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
        return (*[None] * 6, *(one.grad for one in inputs))
