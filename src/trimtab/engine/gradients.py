"""Small gradients side by side in one piece of memory, where blocks run again in backward.

A block that runs again makes its gradients among its activations. The activations go, the gradients stay until the
step, and each of them keeps the next block's activations from the place of the last one's: with LoRA on every linear
of SmolLM2-135M (14 gradients of 18 to 98 KB a block) the heap grew by 50 MB for 10 MB of gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

SMALL = 1 << 20
"""Bytes up to which a gradient is moved: one more writing of it."""
LINE = 64
"""Each begins at a multiple of so many bytes."""
LITTLE = 8
"""Nothing is moved where more than one in so many bytes of the model train."""


@contextmanager
def side_by_side(model: nn.Module) -> Iterator[None]:
    """Inside, small gradients lie in one piece of memory as soon as they are whole.

    Their numbers are those of backward; a parameter that gets none in a step has none. On a CPU only: elsewhere torch
    has pools of its own.
    """
    trained = [one for one in model.parameters() if one.requires_grad]
    held = sum(one.nbytes for one in chain(model.parameters(), model.buffers()))  # codes are buffers
    little = LITTLE * sum(one.nbytes for one in trained) <= held
    moved = [one for one in trained if movable(one)] if little else []
    rooms = Rooms(moved)
    hooks = [one.register_post_accumulate_grad_hook(rooms.move) for one in moved]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def movable(parameter: nn.Parameter) -> bool:
    """Whether a parameter is plain, small and on a CPU."""
    plain = type(parameter) is nn.Parameter and parameter.layout is torch.strided
    return plain and parameter.device.type == "cpu" and parameter.nbytes <= SMALL


class Rooms:
    """A place for the gradient of each parameter, all in one piece of memory, which lives as long as one of them."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.places, self.size = dict[Tensor, tuple[int, int]](), 0
        for one in parameters:
            self.places[one] = (self.size, one.nbytes)
            self.size += one.nbytes + -one.nbytes % LINE
        self.memory: Tensor | None = None
        self.taken: set[Tensor] = set()

    def move(self, parameter: Tensor) -> None:
        """Its gradient, now whole or added to, into its place."""
        gradient, (start, size) = parameter.grad, self.places[parameter]
        if gradient is None or gradient.is_sparse or gradient.nbytes > size:  # the parameter may have grown
            return
        if self.memory is not None and gradient.data_ptr() == self.memory.data_ptr() + start:
            return  # added to where it lies
        if self.memory is None or parameter in self.taken:  # the gradients of another step, which may be held elsewhere
            self.memory = None
            self.memory, self.taken = torch.empty(self.size, dtype=torch.uint8), set()
        self.taken.add(parameter)
        room = self.memory[start : start + gradient.nbytes].view(gradient.dtype).view(gradient.shape)
        parameter.grad = room.copy_(gradient)
