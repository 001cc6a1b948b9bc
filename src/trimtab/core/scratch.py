"""Memory for use inside one operation, the same every time.

Fresh memory costs a CPU more than the arithmetic done on it, and leaves holes between what is kept for backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import local

import torch
from torch import Tensor, nn

_rooms = local()


def room(name: str, like: Tensor, shape: Sequence[int]) -> Tensor:
    """Uninitialized memory of a shape, with the type and device of a tensor, until the next call with this name.

    On a CPU (or where one is planned for, on the meta device) it is kept for the next call; elsewhere, for tensors that
    are none of torch's own class, and in inference mode, whose tensors may not be written to outside it, it is fresh.
    """
    plain = type(like) in (Tensor, nn.Parameter) and not torch.is_inference_mode_enabled()
    if like.device.type not in ("cpu", "meta") or not plain:
        return like.new_empty(shape)
    held, key, count = _rooms.__dict__, f"{name} {like.dtype} {like.device.type}", 1
    for size in shape:
        count *= size
    if key not in held or held[key].numel() < count:
        held[key] = like.new_empty(count)
    return held[key][:count].view(shape)


def held_bytes() -> int:
    """Bytes that are kept for the next calls of `room`."""
    return sum(one.nbytes for one in _rooms.__dict__.values())


def release() -> None:
    """Give back the memory of `room`."""
    _rooms.__dict__.clear()
