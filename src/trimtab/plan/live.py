"""Which bytes are alive while a step runs: a mode that watches every operator and changes none.

It works on the meta device, where tensors have sizes and no memory, and on a real one, where it is the measurement
that a prediction is held against.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

CATEGORIES = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "temporary")


class Live(TorchDispatchMode):
    """Bytes of living storages by category, now and at their highest.

    A storage is counted once, however many views there are, from the operator that makes it until nothing holds it.
    Its category is what `phase` says when it is made, unless `declare` has named it.
    """

    only_watches = True
    """What low-rank products ask of a mode before they run as one function under it."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "temporary"
        self.now = dict.fromkeys(CATEGORIES, 0)
        self.total = 0
        self.peak = 0
        self.at_peak = dict(self.now)
        self.flops = 0
        self._counts: dict[Any, Any] = dict(flop_registry)
        self._counts |= {torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}
        self._known: dict[int, tuple[Any, int, str]] = {}

    def declare(self, tensors: Iterable[Tensor], category: str) -> None:
        """Count tensors under a category, whatever they were counted under before."""
        for tensor in tensors:
            self._count(tensor, category, named=True)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """What is made inside belongs to this category."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def forget_peak(self) -> None:
        """Look for the highest point anew, from here on."""
        self.peak, self.at_peak = self.total, dict(self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = self._counts.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        if isinstance(out, Tensor):
            self._count(out, self.phase)
        elif isinstance(out, tuple | list):
            for one in tree_iter(out):
                if isinstance(one, Tensor):
                    self._count(one, self.phase)
        return out

    def _count(self, tensor: Tensor, category: str, named: bool = False) -> None:
        if tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._known.get(key)
        size = storage.nbytes()
        if known is not None:
            if known[1] == size and (not named or known[2] == category):
                return
            self._add(known[2], -known[1])
            category = category if named else known[2]
            self._known[key] = (known[0], size, category)
        else:
            self._known[key] = (weakref.ref(storage, partial(self._gone, key)), size, category)
        self._add(category, size)

    def _gone(self, key: int, _: Any) -> None:
        known = self._known.pop(key, None)
        if known is not None:
            self._add(known[2], -known[1])

    def _add(self, category: str, size: int) -> None:
        self.now[category] += size
        self.total += size
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.now)
