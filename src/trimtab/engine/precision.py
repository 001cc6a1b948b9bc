"""A model of half precision computing in float32 for a while, where rounding would hide what is asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from trimtab.core.code import Code
from trimtab.core.machine import host_memory


def narrow_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers of two bytes an entry or fewer; not those of codes, which decode to a dtype of theirs."""
    modules = [module for module in model.modules() if not isinstance(module, Code)]
    own = {id(one): one for module in modules for one in (*module._parameters.values(), *module._buffers.values())}
    return [one for one in own.values() if one is not None and one.is_floating_point() and one.element_size() < 4]


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """The model computes in float32 inside, with the numbers it has; then its tensors are the very same again.

    Costs four bytes an entry beside the model.
    """
    narrow = narrow_tensors(model)
    kept = [one.data for one in narrow]
    codes = {code: code.dtype for code in model.modules() if isinstance(code, Code) and code.dtype.itemsize < 4}
    try:
        for one in narrow:
            one.data = one.data.float()
        for code in codes:
            code.to(torch.float32)
        yield
    finally:
        for one, data in zip(narrow, kept, strict=True):
            one.data = data
        for code, dtype in codes.items():
            code.to(dtype)


def exactly(model: nn.Module) -> AbstractContextManager[None]:
    """`in_float32` where there is room for that, else nothing."""
    return in_float32(model) if room_for_float32(model) else nullcontext()


def room_for_float32(model: nn.Module) -> bool:
    """Whether a copy in float32 takes no more than half of an accelerator's free memory, or a quarter of the host's."""
    narrow = narrow_tensors(model)
    wanted = sum(4 * one.numel() for one in narrow)
    if not narrow or narrow[0].device.type != "cuda":
        return wanted <= host_memory() / 4
    return wanted <= torch.cuda.mem_get_info(narrow[0].device)[0] / 2
