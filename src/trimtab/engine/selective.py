"""What a block that runs again keeps of its first run, if that is more than its input: `selective` checkpointing.

Attention, and matrix products whose result is no larger than what they read: these cost most for their bytes. In a
decoder block that is all but the way up of the feed-forward, so the second run is half of a forward at a bit more than
half of the memory of keeping everything. A result that is changed in place afterwards is not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab.engine.rerun import LEAST, Shelf

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "convolution", "_linear_pointwise")


class Step(NamedTuple):
    """One product or attention: its name, what it read, and what is held of its result, if anything is."""

    name: str
    shapes: tuple[torch.Size, ...]
    held: tuple[Any, ...]


@dataclass
class Results:
    """Where the kept results of a stack of blocks wait: on a CPU those of one kind side by side, as inputs do."""

    blocks: int
    on_cpu: bool
    shelves: dict[tuple[int, int], Shelf] = field(default_factory=dict)

    @contextmanager
    def first(self) -> Iterator[Callable[[], list[Step]]]:
        """The first run of a block; what is yielded returns what is kept of it."""
        with FirstRun() as seen:
            yield lambda: seen.kept(self)

    def again(self, kept: list[Step]) -> SecondRun:
        """The second run of a block."""
        return SecondRun(kept)

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[Any]]:
        """First and second run, as torch's own checkpoint takes them: it would keep what is changed in place."""
        kept: list[Step] = []

        @contextmanager
        def first() -> Iterator[None]:
            with self.first() as held:
                yield
            kept.extend(held())

        return first(), Later(kept)

    def put(self, step: int, part: int, value: Any) -> Any:
        """What is held of a part of the result of the n-th step of a block."""
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        return self.shelves.setdefault((step, part), Shelf(self.blocks)).put(value) if self.on_cpu else value


class Later:
    """The second run of a block whose first run fills the list meanwhile; it may come more than once."""

    def __init__(self, kept: list[Step]) -> None:
        self.kept, self.runs = kept, list[SecondRun]()

    def __enter__(self) -> None:
        self.runs.append(SecondRun(self.kept))
        self.runs[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self.runs.pop().__exit__(*error)


def candidate(operator: Any, args: Sequence[Any]) -> str | None:
    """The name of a product or an attention without dropout, None for any other operator."""
    name: str = operator.name().split("::")[-1].split(".")[0]
    if "scaled_dot_product" in name:
        drawn = next((one for one in args if isinstance(one, float)), 0.0)
        return None if drawn or name.endswith("backward") else name
    return name if name in PRODUCTS else None


def read_by(args: Sequence[Any]) -> tuple[torch.Size, ...]:
    """Shapes of the tensors among arguments."""
    return tuple(one.shape for one in args if isinstance(one, Tensor))


def memory_of(tensor: Tensor) -> int:
    """The memory that a tensor is, or is a view of; told apart where there is none (on the meta device) too."""
    return int(tensor.untyped_storage()._cdata)


def written_to(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> set[int]:
    """The memory of what an operator changes in place."""
    named = {**{one.name: value for one, value in zip(operator._schema.arguments, args, strict=False)}, **kwargs}
    changed = [named.get(one.name) for one in operator._schema.arguments if one.is_write]
    return {memory_of(one) for one in torch.utils._pytree.tree_leaves(changed) if isinstance(one, Tensor)}


class FirstRun(TorchDispatchMode):
    """Notes every product and attention; `kept` then says which results are held."""

    only_watches = True

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[torch.Size, ...], Any]] = []
        self.changed: set[int] = set()
        """Where something was written to; a tensor's own count of that is not shared by what a product is viewed as."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operator(*args, **(kwargs or {}))
        if operator._schema.is_mutable:
            self.changed |= written_to(operator, args, kwargs or {})
        name = candidate(operator, args) if not kwargs or "out" not in kwargs else None
        if name is not None:
            first = out[0] if isinstance(out, tuple) else out
            read = [one for one in args if isinstance(one, Tensor) and not isinstance(one, torch.nn.Parameter)]
            most = max((one.numel() for one in read), default=0)  # of parameters alone (HiRA's B A) nothing is held
            wanted = first.nbytes >= LEAST and first.numel() <= most
            self.changed.discard(memory_of(first))
            self.found.append((name, read_by(args), out if wanted else None))
        return out

    def kept(self, results: Results) -> list[Step]:
        """The steps, with the results that are worth keeping and were not changed."""
        steps = []
        for number, (name, shapes, out) in enumerate(self.found):
            parts = out if isinstance(out, tuple) else (out,)
            sound = parts[0] is not None and memory_of(parts[0]) not in self.changed
            held = tuple(results.put(number, part, value) for part, value in enumerate(parts)) if sound else ()
            steps.append(Step(name, shapes, held))
        self.found.clear()
        return steps


class SecondRun(TorchDispatchMode):
    """Hands out what is held in place of computing it; where a step is not the one that was noted, all is computed."""

    only_watches = True

    def __init__(self, steps: Sequence[Step]) -> None:
        super().__init__()
        self.left = list(reversed(steps))

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = candidate(operator, args) if not kwargs or "out" not in kwargs else None
        if name is not None and self.left:
            step = self.left.pop()
            if (step.name, step.shapes) != (name, read_by(args)):
                self.left.clear()
            elif step.held:
                return step.held if len(step.held) > 1 else step.held[0]
        return operator(*args, **(kwargs or {}))
