"""Weights that a model reads from a mapped file: where their numbers begin, and what of the file stays in memory.

A safetensors file is mapped as it is. Its tensors begin where its header ends, mostly not at a multiple of 64 bytes,
which costs a CPU's matrix products up to a sixth of their speed; and every page that was read once counts as the
process's memory for as long as the file is mapped, also when the weight it holds has long been encoded or replaced.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.machine import host_memory

LINE = 64
"""Bytes of a cache line."""
SMALL = 1 << 16
"""Entries of a matrix below which it stays where it is."""
PIECE = 1 << 23
"""Bytes that are copied before their pages are let go."""
SWAPPED, OF_A_FILE = 1 << 62, 1 << 61  # Linux, Documentation/admin-guide/mm/pagemap.rst


def let_go(tensor: Tensor) -> int:
    """Give pages of a mapped file that hold this tensor back to the system, which reads them again when asked.

    Returns the bytes given back: 0 unless all pages are those of a file, unchanged. A page that was written to is a
    private copy, so it counts as changed and everything stays. Linux only; elsewhere the system decides by itself.
    """
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" and tensor.layout is torch.strided
    if sys.platform != "linux" or not plain or not tensor.is_contiguous():
        return 0
    size = mmap.PAGESIZE
    first, end = -(-tensor.data_ptr() // size), (tensor.data_ptr() + tensor.nbytes) // size
    if end <= first or not all_of_a_file(first, end):
        return 0
    advise = ctypes.CDLL(None).madvise
    failed = advise(ctypes.c_void_p(first * size), ctypes.c_size_t((end - first) * size), mmap.MADV_DONTNEED)
    return 0 if failed else (end - first) * size


def all_of_a_file(first: int, end: int) -> bool:
    """Whether those of these pages that are in memory are a file's, unchanged, and there is at least one."""
    try:
        with Path("/proc/self/pagemap").open("rb") as pages:
            pages.seek(8 * first)
            found = bytearray(pages.read(8 * (end - first)))
    except (OSError, ValueError):
        return False
    if not found or len(found) % 8:
        return False
    flags = torch.frombuffer(found, dtype=torch.int64)
    here = flags[flags < 0]  # the highest bit: in memory
    return len(here) > 0 and bool((here & OF_A_FILE != 0).all()) and not bool((flags & SWAPPED).any())


@torch.no_grad()
def align(model: nn.Module) -> list[str]:
    """Move large frozen matrices that do not begin at a cache line to where they do; returns the paths of their layers.

    Piece by piece, so that hardly more than before is in memory at any time. A mere lookup table stays, and so does
    what nothing reads: a weight that a delta puts its own in place of, or one in codes. Matrices of more than half the
    machine's memory stay all of them: mapped, the system can drop their pages when it has to.
    """
    found: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        W = module._parameters.get("weight")
        if W is not None and not isinstance(module, nn.Embedding) and movable(W) and not replaced(module):
            found[path] = W
    distinct = {id(W): W for W in found.values()}.values()
    if 2 * sum(W.nbytes for W in distinct) > host_memory():  # what is free now would make two runs differ
        return []
    for W in distinct:
        fresh = torch.empty_like(W.data)
        old, new = W.data.view(-1), fresh.view(-1)
        step = PIECE // W.element_size()
        for at in range(0, W.numel(), step):
            new[at : at + step] = old[at : at + step]
            let_go(old[at : at + step])
        W.data = fresh
    return list(found)


def movable(W: Tensor) -> bool:
    """Whether a weight is a large frozen matrix in a CPU's memory that begins inside a cache line."""
    plain = W.device.type == "cpu" and type(W) is nn.Parameter and not W.requires_grad and W.is_contiguous()
    return plain and W.ndim == 2 and W.numel() >= SMALL and W.data_ptr() % LINE != 0


def let_go_replaced(model: nn.Module) -> int:
    """Give back the pages of weights that deltas put their own in place of; returns how many bytes."""
    found = [module._parameters.get("weight") for module in model.modules() if replaced(module)]
    return sum(let_go(W) for W in found if W is not None)


def replaced(module: nn.Module) -> bool:
    """Whether a delta gives its own weight in place of this module's."""
    deltas: Any = module._modules.get("delta")
    return deltas is not None and any(one.method.replaces and one.rows is None for one in deltas.values())
