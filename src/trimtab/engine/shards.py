"""Frozen weights spread over the processes by torch's FSDP2, block by block; what trains is whole in each of them.

A block's weights are gathered when it runs and dropped again after it, forward and backward; quantized codes travel as
they are. Adapters are small: whole in every process, they train as in one, whatever the method and the optimizer, and
are saved as one file by any of them. The memory of a process is its share of the base, one block, and the adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from trimtab.core.attach import SHARED
from trimtab.core.code import Code
from trimtab.core.delta import Delta
from trimtab.core.errors import UserError
from trimtab.core.quantized import quantized_modules
from trimtab.core.site import is_conv1d
from trimtab.engine.checkpointing import stacks_of
from trimtab.engine.heap import give_memory_back
from trimtab.engine.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from trimtab.models.slices import Slices


def shard(model: nn.Module, way: str, device: torch.device, ranks: Ranks, slices: Slices | None = None) -> None:
    """Spread the frozen parameters of a model, in place: `full` over all processes, `hybrid` over those of a machine.

    `hybrid` keeps a copy of the base on every machine, so only gradients go between machines. A model on the meta
    device gets its weights now, from `slices`: each process reads the rows it keeps. A weight that is quantized is read
    whole, one at a time, encoded, and cut.
    """
    from torch.distributed.fsdp import fully_shard

    if device.type == "cpu":
        give_memory_back()
    mesh, own = mesh_of(way, device, ranks), set(kept_whole(model))
    for parameter in own:
        parameter.data = parameter.data.to(device)
    for blocks in stacks_of(model):
        for block in blocks:
            fully_shard(block, mesh=mesh, ignored_params=own)
    fully_shard(model, mesh=mesh, ignored_params=own, reshard_after_forward=False)
    if slices is not None:
        model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device))
        fill(model, slices)
        slices.close()


@torch.no_grad()
def fill(model: nn.Module, slices: Slices) -> None:
    """Read this process's part of every frozen parameter."""
    codes: dict[str, Any] = {path: module._modules["code"] for path, module in quantized_modules(model)}
    inside = tuple(f"{path}.code." for path in codes)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and not name.startswith(inside):
            local = parameter.to_local()
            local.copy_(slices.read(name, *rows_of(parameter)))
    for path, code in codes.items():
        W = slices.read(f"{path}.weight")
        made = Code.of(W.mT if is_conv1d(model.get_submodule(path)) else W, code.format)
        for key, whole in made.tensors().items():
            kept = code._parameters[key]
            if isinstance(kept, DTensor):
                start, stop = rows_of(kept)
                kept.to_local().copy_(whole[start:stop])
            else:
                kept.copy_(whole)


def rows_of(parameter: DTensor) -> tuple[int, int]:
    """The rows of a sharded parameter that are this process's."""
    mesh = parameter.device_mesh
    chunk = -(-parameter.shape[0] // mesh.size(mesh.ndim - 1))
    start = min(mesh.get_local_rank(mesh.ndim - 1) * chunk, parameter.shape[0])
    return start, min(start + chunk, parameter.shape[0])


def kept_whole(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that every process keeps whole: what trains, the rest of the adapters, and single numbers."""
    for path, module in model.named_modules():
        if isinstance(module, Delta) or path == SHARED:
            yield from module.parameters()
    yield from (one for one in model.parameters() if one.requires_grad or one.ndim == 0)


def mesh_of(way: str, device: torch.device, ranks: Ranks) -> DeviceMesh:
    """The processes in a row, or in rows of one machine each."""
    import torch.distributed as dist

    if way == "full":
        return dist.init_device_mesh(device.type, (ranks.size,), mesh_dim_names=("shard",))
    if ranks.size % ranks.local_size:
        raise UserError(
            f"shard: hybrid needs as many processes on every machine, and {ranks.size} are not rows of "
            f"{ranks.local_size}",
            fix="shard: full",
        )
    shape: Any = (ranks.size // ranks.local_size, ranks.local_size)
    return dist.init_device_mesh(device.type, shape, mesh_dim_names=("copies", "shard"))
