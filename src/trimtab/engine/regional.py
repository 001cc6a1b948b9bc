"""Regional compilation: torch.compile of the decoder blocks alone, once for all of them and for packs of any length.

The blocks of a stack are one program with other weights, so it is compiled once; lengths are symbols in it, so nothing
is compiled again as they change. Attention over packed rows goes by their segments, which are no tensors: it stays
outside, a block is compiled in the two pieces around it, and what it hands through to its attention is sealed, since a
program is bound to the number of things in a tuple. Adapters are compiled with their block, hooks too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trimtab.core.errors import UserError
from trimtab.core.swap import swap, unswap
from trimtab.engine.checkpointing import stacks_of

PROGRAMS = 64
"""How many programs a block may have: in training and without gradients, with adapters of one kind or another."""


class Sealed:
    """Something that compiled code hands on without a look at it."""

    def __init__(self, value: Any) -> None:
        self.value = value


@contextmanager
def compiled(model: nn.Module, way: str = "blocks") -> Iterator[None]:
    """Train the model with compiled blocks inside; measuring it goes as before. Errors: a model without blocks."""
    if way == "off":
        yield
        return
    stacks = stacks_of(model)
    if not stacks:
        raise UserError(f"compile: {type(model).__name__} has no stack of blocks", fix="compile: off")
    import torch._dynamo

    blocks = [block for stack in stacks for block in stack]
    for block in blocks:
        block.__dict__["_trimtab_program"] = torch.compile(block._call_impl, dynamic=True)
        swap(block, programmed)
    try:
        with torch._dynamo.config.patch(recompile_limit=PROGRAMS), attention_outside(model):
            yield
    finally:
        for block in blocks:
            unswap(block)
            del block.__dict__["_trimtab_program"]


def programmed(cls: type) -> dict[str, Any]:
    """Namespace of a block that runs as its program while it trains."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.training or torch.compiler.is_compiling():
            return cls.__call__(self, *args, **kwargs)
        if isinstance(kwargs.get("segments"), tuple | list):
            kwargs = {**kwargs, "segments": Sealed(kwargs["segments"])}
        try:
            return self.__dict__["_trimtab_program"](*args, **kwargs)
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            why = "; ".join(line.strip() for line in str(error).strip().splitlines()[:2]) or repr(error)
            raise UserError(
                f"compile: torch {torch.__version__} could not compile a {cls.__name__}: {why}",
                fix="compile: off; on a CPU torch needs a C++ compiler",
            ) from error

    return {"__call__": call}


@contextmanager
def attention_outside(model: Any) -> Iterator[None]:
    """Keep an attention function of ours out of compiled code; transformers' own ones are compiled."""
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if not isinstance(name, str) or not name.startswith("trimtab_"):
        yield
        return
    from transformers import AttentionInterface

    plain: Callable[..., Any] = AttentionInterface()[name]

    def opened(*args: Any, segments: Any = None, **options: Any) -> Any:
        return plain(*args, segments=segments.value if isinstance(segments, Sealed) else segments, **options)

    AttentionInterface.register(name, torch.compiler.disable(opened))
    try:
        yield
    finally:
        AttentionInterface.register(name, plain)
