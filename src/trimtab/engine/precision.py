"""A model computing in a wider floating type for a while, where its own rounding would hide what is asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from trimtab.core.code import Code
from trimtab.core.machine import host_memory


def narrow_tensors(model: nn.Module, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Parameters and buffers of a floating type narrower than `dtype`; not those of codes, which have one of theirs."""
    modules = [module for module in model.modules() if not isinstance(module, Code)]
    own = {id(one): one for module in modules for one in (*module._parameters.values(), *module._buffers.values())}
    floating = [one for one in own.values() if one is not None and one.is_floating_point()]
    return [one for one in floating if one.element_size() < dtype.itemsize]


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """The model computes in `dtype` inside, with the numbers it has; then its tensors are the very same again.

    Costs a copy in `dtype` beside the model.
    """
    narrow = narrow_tensors(model, dtype)
    kept = [one.data for one in narrow]
    codes = {one: one.dtype for one in model.modules() if isinstance(one, Code) and one.dtype.itemsize < dtype.itemsize}
    try:
        for one in narrow:
            one.data = one.data.to(dtype)
        for code in codes:
            code.to(dtype)
        yield
    finally:
        for one, data in zip(narrow, kept, strict=True):
            one.data = data
        for code, own in codes.items():
            code.to(own)


def exactly(model: nn.Module) -> AbstractContextManager[None]:
    """`computing_in` float32 where there is room for that, else nothing."""
    return computing_in(model) if room_for(model) else nullcontext()


def room_for(model: nn.Module, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the device has the type, and a copy in it takes no more than half of an accelerator's free memory, or a
    quarter of the host's."""
    narrow = narrow_tensors(model, dtype)
    if not narrow:
        return True
    device, wanted = narrow[0].device, sum(dtype.itemsize * one.numel() for one in narrow)
    if device.type == "mps" and dtype == torch.float64:
        return False
    if device.type != "cuda":
        return wanted <= host_memory() / 4
    return wanted <= torch.cuda.mem_get_info(device)[0] / 2
