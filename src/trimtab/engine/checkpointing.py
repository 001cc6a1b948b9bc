"""Gradient checkpointing: which activations of the decoder blocks are kept for backward, and which are made again.

    block      every block keeps its input only and runs again in backward (arXiv 1604.06174)
    sqrt       groups of √depth blocks keep one input: less memory, the same one extra forward
    selective  results of matrix products and attention are kept, all that is cheap between them is made again
    offload    as `block`, and the inputs wait outside the device: in pinned host memory on CUDA, on disk on a CPU

Gradients are those without checkpointing, for every method and for packed rows.
"""

from __future__ import annotations

import math
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from trimtab.core.errors import UserError
from trimtab.core.swap import swap, unswap

POLICIES = ("off", "block", "sqrt", "selective", "offload")
KEPT = ("mm", "addmm", "bmm", "baddbmm", "linear", "convolution")
"""Operators whose results `selective` keeps, besides attention's."""
LEAST = 1 << 16
"""Bytes below which a tensor is not worth offloading."""


@contextmanager
def checkpointing(model: nn.Module, policy: str) -> Iterator[None]:
    """Train the model under a checkpointing policy inside; afterwards its blocks are as before."""
    if policy == "off":
        yield
        return
    if policy not in POLICIES:
        raise UserError(f"checkpointing: no policy {policy!r}", fix=f"one of {', '.join(POLICIES)}")
    stacks = stacks_of(model)
    if not stacks:
        raise UserError(
            f"checkpointing: {type(model).__name__} has no stack of blocks that could run again",
            fix="checkpointing: off",
        )
    with tempfile.TemporaryDirectory() if policy == "offload" else nullcontext() as folder:
        for blocks in stacks:
            size = math.isqrt(len(blocks) - 1) + 1
            groups = [Group(blocks[at : at + size]) for at in range(0, len(blocks), size)]
            for place, block in enumerate(blocks):
                block.__dict__["_trimtab_again"] = groups[place // size] if policy == "sqrt" else Again(policy, folder)
                swap(block, grouped if policy == "sqrt" else wrapped)
        try:
            yield
        finally:
            for block in (block for blocks in stacks for block in blocks):
                unswap(block)
                del block.__dict__["_trimtab_again"]


def stacks_of(model: nn.Module) -> list[list[nn.Module]]:
    """The blocks of the deepest stack, the longest list of modules that all have the same parts, and of its like."""
    stacks = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    alike = [stack for stack in stacks if len({frozenset(parts(block)) for block in stack}) == 1 and parts(stack[0])]
    deepest = max(alike, key=lambda stack: (len(stack), size_of(stack)), default=[])
    return [stack for stack in alike if plain_class(stack[0]) is plain_class(deepest[0])]


def plain_class(block: nn.Module) -> type:
    """The class of a block, but for what an adapter made of it."""
    cls: Any = type(block)
    while "_origin" in vars(cls):
        cls = cls._origin[0]
    return cls


def parts(block: nn.Module) -> set[str]:
    """Names of a block's direct parts, but for what an adapter adds."""
    return set(block._modules) - {"delta"}


def size_of(stack: list[nn.Module]) -> int:
    """Entries of all parameters of a stack."""
    return sum(parameter.numel() for block in stack for parameter in block.parameters())


def again(block: nn.Module) -> bool:
    """Whether a forward of this block now should keep little: in training, and with gradients."""
    return block.training and torch.is_grad_enabled()


@dataclass(frozen=True)
class Again:
    """How a single block runs again."""

    policy: str
    folder: str | None


def wrapped(cls: type) -> dict[str, Any]:
    """Namespace of a block that runs again in backward, its hooks too."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = partial(cls.__call__, self)
        if not again(self):
            return run(*args, **kwargs)
        how: Again = self.__dict__["_trimtab_again"]
        if how.policy == "selective":
            return checkpoint(run, *args, use_reentrant=False, context_fn=selective, **kwargs)
        with outside(how.folder) if how.policy == "offload" else nullcontext():
            return checkpoint(run, *args, use_reentrant=False, **kwargs)

    return {"__call__": call}


def selective() -> Any:
    """The contexts of `selective`: first run and second run."""
    return create_selective_checkpoint_contexts(keep_products)


def keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep matrix products and attention, make the rest again."""
    name = operator.name().split("::")[-1].split(".")[0]
    kept = name in KEPT or "scaled_dot_product" in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@dataclass
class Group:
    """Consecutive blocks that run, and run again, as one; they must all be called with the same arguments."""

    blocks: list[nn.Module]
    given: tuple[Any, ...] = ()


def grouped(cls: type) -> dict[str, Any]:
    """Namespace of a block in a group: the first one runs all of them, the others hand on what they are given."""

    def call(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not again(self):
            return cls.__call__(self, x, *args, **kwargs)
        group: Group = self.__dict__["_trimtab_again"]
        if self is group.blocks[0]:
            group.given = (args, kwargs)
            runs = [partial(type(block)._origin[0].__call__, block) for block in group.blocks]  # type: ignore[attr-defined]
            return checkpoint(in_turn, x, runs, args, kwargs, use_reentrant=False)
        if not alike(group.given, (args, kwargs)):
            raise UserError(
                "checkpointing: sqrt needs blocks that are called alike, and these get different masks or positions",
                fix="checkpointing: block",
            )
        if self is group.blocks[-1]:
            group.given = ()
        return x

    return {"__call__": call}


def in_turn(x: Tensor, runs: list[Callable[..., Any]], args: Any, kwargs: Any) -> Tensor:
    """One block after the other."""
    for run in runs:
        out = run(x, *args, **kwargs)
        if isinstance(out, tuple) and any(one is not None for one in out[1:]):
            raise UserError(
                "checkpointing: sqrt needs blocks that hand on one thing, and these hand on more (a position bias)",
                fix="checkpointing: block",
            )
        x = out[0] if isinstance(out, tuple) else out
    return x


def alike(one: Any, other: Any) -> bool:
    """Whether two argument lists hold the same things."""
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    return one is other or (not isinstance(one, Tensor) and bool(one == other))


class Parked:
    """A tensor in a file that goes away with this object."""

    def __init__(self, tensor: Tensor, folder: str) -> None:
        from safetensors.torch import save_file

        handle, self.path = tempfile.mkstemp(dir=folder, suffix=".safetensors")
        os.close(handle)
        save_file({"x": tensor.detach().contiguous()}, self.path)
        weakref.finalize(self, Path(self.path).unlink, missing_ok=True)

    def tensor(self) -> Tensor:
        from safetensors.torch import load_file

        return load_file(self.path)["x"]


def outside(folder: str | None) -> saved_tensors_hooks:
    """Hooks that keep large saved tensors off the device until backward."""

    def away(tensor: Tensor) -> Any:
        if tensor.nbytes < LEAST or isinstance(tensor, nn.Parameter):
            return tensor
        if tensor.device.type == "cuda":
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            return tensor.device, host.copy_(tensor, non_blocking=True)
        return tensor.device, Parked(tensor, folder or tempfile.gettempdir())

    def back(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        device, where = kept
        return where.tensor().to(device) if isinstance(where, Parked) else where.to(device, non_blocking=True)

    return saved_tensors_hooks(away, back)
