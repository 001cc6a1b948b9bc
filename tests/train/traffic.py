"""What a process sends and receives through torch.distributed, counted call by call."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "broadcast_": "broadcast",
}


class Traffic(TorchDispatchMode):
    """Calls and whole payloads by kind: of an all-gather what comes out, of an all-reduce what goes in.

    Numbers of float64 and int64 are the loop's own agreements (terms, losses, flags), counted apart as `control`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.name().split("::")[1].split(".")[0]
            kind = KINDS.get(name)
            if kind is not None:
                tensors = flat(args[0])
                control = all(one.dtype in (torch.float64, torch.int64) for one in tensors)
                kind = "control" if control else kind
                self.calls[kind] += 1
                self.bytes[kind] += sum(one.numel() * one.element_size() for one in tensors)
            elif "barrier" not in name:
                self.calls[f"other:{name}"] += 1
        return func(*args, **(kwargs or {}))


def flat(thing: Any) -> list[torch.Tensor]:
    """All tensors in nested lists."""
    if isinstance(thing, torch.Tensor):
        return [thing]
    return [one for item in thing for one in flat(item)] if isinstance(thing, list | tuple) else []
