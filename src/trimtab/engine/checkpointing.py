"""Gradient checkpointing: which activations of the decoder blocks are kept for backward, and which are made again.

    block      every block keeps its input only and runs again in backward (arXiv 1604.06174)
    sqrt       groups of √depth blocks keep one input: less memory, the same one extra forward
    selective  attention and products with small results are kept too: half a forward in backward, half the memory
    offload    as `block`, and the inputs wait outside the device: in pinned host memory on CUDA, on disk on a CPU

Gradients are those without checkpointing, for every method and for packed rows.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from trimtab.core.attach import SHARED
from trimtab.core.errors import UserError
from trimtab.core.swap import below, original, swap, unswap
from trimtab.engine import rerun as rerunning
from trimtab.engine.gradients import side_by_side
from trimtab.engine.heap import trim
from trimtab.engine.rerun import Disk, PinnedHost, Place, Shelf, can_rerun, rerun, taken_apart
from trimtab.engine.selective import Results

WORTH = 16 << 20
"""Bytes of the inputs of all blocks from which freed memory is given back around them: giving and getting it again took
4 % of a step of SmolLM2-135M over 500 tokens, but 14 % of one of MiniLM, which has little to give."""
POLICIES = ("off", "block", "sqrt", "selective", "offload")


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
            size = math.isqrt(len(blocks) - 1) + 1 if policy == "sqrt" else 1
            on_cpu = next(blocks[0].parameters()).device.type == "cpu"
            keeper = Results(len(blocks), on_cpu) if policy == "selective" else None
            place = place_for(blocks, policy, size, folder)
            how = Again(policy, whole(model), place, keeper, tuple(blocks) if on_cpu else ())
            groups = [Group(blocks[at : at + size], how) for at in range(0, len(blocks), size)]
            for at, block in enumerate(blocks):
                block.__dict__["_trimtab_again"] = groups[at // size] if policy == "sqrt" else how
                swap(block, grouped if policy == "sqrt" else wrapped)
        try:
            with side_by_side(model):
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
    return [stack for stack in alike if original(type(stack[0])) is original(type(deepest[0]))]


def parts(block: nn.Module) -> set[str]:
    """Names of a block's direct parts, but for what an adapter adds."""
    return set(block._modules) - {"delta"}


def size_of(stack: list[nn.Module]) -> int:
    """Entries of all parameters of a stack."""
    return sum(parameter.numel() for block in stack for parameter in block.parameters())


def again(block: nn.Module) -> bool:
    """Whether a forward of this block now should keep little: in training, and with gradients."""
    return block.training and torch.is_grad_enabled()


def whole(model: nn.Module) -> bool:
    """Whether a block's graph can be cut off at its arguments: no weight comes or goes with hooks on its graph, as
    sharded ones do, and no trained network outside makes what several blocks read."""
    sharded = any(cls.__name__ == "FSDPModule" for module in model.modules() for cls in type(module).__mro__)
    shared: Any = model._modules.get(SHARED)
    return not sharded and (shared is None or not any(one.requires_grad for one in shared.parameters()))


def place_for(blocks: list[nn.Module], policy: str, size: int, folder: str | None) -> Place | None:
    """Where the inputs of blocks, or groups of so many, wait for backward; None where they stay as they are."""
    on_cpu = next(blocks[0].parameters()).device.type == "cpu"
    if folder is not None:
        return Disk(folder) if on_cpu else PinnedHost()
    return Shelf(-(-len(blocks) // size)) if on_cpu else None


@dataclass(frozen=True)
class Again:
    """How blocks run again."""

    policy: str
    whole: bool
    place: Place | None
    keeper: Results | None
    sparing: tuple[nn.Module, ...]
    """The blocks around which freed memory goes back; none on a device with pools of its own."""

    @contextmanager
    def between(self, block: nn.Module, args: Any) -> Iterator[None]:
        """A block's turn: what a pass has freed goes back before the first one, what the blocks did after the last."""
        first, last = (block is self.sparing[at] if self.sparing else False for at in (0, -1))
        tensors: list[Tensor] = []
        if first or last:
            taken_apart(args, tensors)
        worth = bool(tensors) and len(self.sparing) * tensors[0].nbytes >= WORTH
        if worth and first:
            trim()
        yield
        if worth and last:
            trim()

    def __call__(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`run`, of which backward makes again what the policy does not keep."""
        if self.whole and can_rerun((args, kwargs)):
            return rerun(run, args, kwargs, self.place, self.keeper)
        if self.keeper is not None:
            return checkpoint(run, *args, use_reentrant=False, context_fn=self.keeper.contexts, **kwargs)
        with elsewhere(self.place) if self.policy == "offload" and self.place else nullcontext():
            return checkpoint(run, *args, use_reentrant=False, **kwargs)


def elsewhere(place: Place) -> saved_tensors_hooks:
    """Hooks that keep large saved tensors in a place until backward."""

    def away(tensor: Tensor) -> Any:
        small = tensor.nbytes < rerunning.LEAST or isinstance(tensor, nn.Parameter)
        return tensor if small else (place.put(tensor),)

    return saved_tensors_hooks(away, lambda kept: place.get(kept[0]) if isinstance(kept, tuple) else kept)


def wrapped(cls: type) -> dict[str, Any]:
    """Namespace of a block that runs again in backward, its hooks too."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = partial(cls.__call__, self)
        if not again(self):
            return run(*args, **kwargs)
        how: Again = self.__dict__["_trimtab_again"]
        with how.between(self, (args, kwargs)):
            return how(run, args, kwargs) if trains([self], args, kwargs) else run(*args, **kwargs)

    return {"__call__": call}


def trains(blocks: list[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether blocks with these arguments have anything to do in backward."""
    tensors: list[Tensor] = []
    taken_apart((args, kwargs), tensors)
    own = (one for block in blocks for one in block.parameters())
    return any(one.requires_grad for one in (*tensors, *own))


@dataclass
class Group:
    """Consecutive blocks that run, and run again, as one; they must all be called with the same arguments."""

    blocks: list[nn.Module]
    how: Again
    given: tuple[Any, ...] = ()
    beside: tuple[None, ...] | None = None
    """What a block returns beside its output, all of it nothing; None where it returns no tuple."""


def grouped(cls: type) -> dict[str, Any]:
    """Namespace of a block in a group: the first one runs all of them, the others hand on what they are given."""

    def call(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not again(self):
            return cls.__call__(self, x, *args, **kwargs)
        group: Group = self.__dict__["_trimtab_again"]
        if self is group.blocks[0]:
            group.given = (args, kwargs)
            runs = [partial(below(type(block)).__call__, block) for block in group.blocks]
            run, given = partial(_in_turn, runs), (x, *args)
            with group.how.between(self, given):
                out = group.how(run, given, kwargs) if trains(group.blocks, given, kwargs) else run(*given, **kwargs)
            group.beside = out[1:] if isinstance(out, tuple) else None
            return out
        if not alike(group.given, (args, kwargs)):
            raise UserError(
                "checkpointing: sqrt needs blocks that are called alike, and these get different masks or positions",
                fix="checkpointing: block",
            )
        if self is group.blocks[-1]:
            group.given = ()
        with group.how.between(self, (x,)):
            return x if group.beside is None else (x, *group.beside)

    return {"__call__": call}


def _in_turn(runs: Sequence[Callable[..., Any]], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """One block after the other; returns what the last one does."""
    out: Any = x
    for run in runs:
        out = run(x, *args, **kwargs)
        if isinstance(out, tuple) and any(one is not None for one in out[1:]):
            raise UserError(
                "checkpointing: sqrt needs blocks that hand on one thing, and these hand on more (a position bias)",
                fix="checkpointing: block",
            )
        x = out[0] if isinstance(out, tuple) else out
    return out


def alike(one: Any, other: Any) -> bool:
    """Whether two argument lists hold the same things."""
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    return one is other or (not isinstance(one, Tensor) and bool(one == other))
