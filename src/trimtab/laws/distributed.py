"""The law of several processes: DDP and FSDP2 on two ranks compute the gradients of one process.

All cases given to `together` share one start of two processes, which is most of the time.
"""

from __future__ import annotations

import faulthandler
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.part import Attachable
from trimtab.core.save import adapter_tensors, load, save
from trimtab.laws.case import Case, storages
from trimtab.laws.hosts import zoo
from trimtab.laws.judging import close, require, trainable
from trimtab.laws.law import law
from trimtab.laws.running import gradients, loss_of, same_gradients

RANKS = 2
RTOL = 1e-4


@law(11, "distributed", host="decoder", storages="kinds", slow=lambda case: True)
def distributed(case: Case) -> None:
    """DDP and FSDP2 (each block sharded) on two ranks give one process's gradients; a sharded adapter saves whole."""
    for way, problem in together([case])[case.id].items():
        require(problem is None, f"{way}: {problem}")


def together(cases: Sequence[Case]) -> dict[str, dict[str, str | None]]:
    """Case id -> way (ddp, fsdp) -> what is wrong, for cases on the zoo's hosts; one start of the processes for all."""
    jobs = [(case.method, case.host.name, case.storage.name) for case in cases]
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(work, (jobs, directory), nprocs=RANKS)
        told: list[dict[str, str | None]] = json.loads((Path(directory) / "told.json").read_text())
    return {case.id: one for case, one in zip(cases, told, strict=True)}


def work(rank: int, jobs: list[tuple[Attachable, str, str]], directory: str) -> None:
    """What each process does: all jobs in order, both ways."""
    faulthandler.enable()
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", f"file://{directory}/meeting", rank=rank, world_size=RANKS)
    hosts, kept = {host.name: host for host in zoo()}, {storage.name: storage for storage in storages()}
    told = []
    for number, (method, host, storage) in enumerate(jobs):
        case = Case(method, hosts[host], kept[storage])
        found = {}
        for way, check in (("ddp", replicated), ("fsdp", sharded)):
            try:
                check(case, rank, Path(directory) / f"{number}-{way}")
                problem = None
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            problems: list[Any] = [None] * RANKS
            torch.distributed.all_gather_object(problems, problem)
            found[way] = next((one for one in problems if one is not None), None)
        told.append(found)
    if rank == 0:
        (Path(directory) / "told.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()


def part(inputs: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The rows of one rank."""
    return {key: value.chunk(RANKS)[rank] for key, value in inputs.items()}


def expected(case: Case) -> dict[str, Tensor]:
    """Gradients in one process: the mean over the ranks' parts."""
    model = case.attached().train()
    losses = [loss_of(case.run(model, part(case.inputs(), rank))) for rank in range(RANKS)]
    return gradients(model, torch.stack(losses).mean())


def replicated(case: Case, rank: int, folder: Path) -> None:
    """DistributedDataParallel."""
    reference = expected(case)
    model = case.attached().train()
    parallel = nn.parallel.DistributedDataParallel(model)
    loss_of(case.run(parallel, part(case.inputs(), rank))).backward()
    found = {name: one.grad for name, one in trainable(model).items() if one.grad is not None}
    same_gradients(found, reference, max(RTOL, 8 * case.storage.eps), "gradients")


def sharded(case: Case, rank: int, folder: Path) -> None:
    """FSDP2: every block and the rest, then a step, then the adapter saved from shards."""
    from torch.distributed.fsdp import fully_shard

    reference = expected(case)
    model: Any = case.attached().train()
    mesh = torch.distributed.init_device_mesh("cpu", (RANKS,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss_of(case.run(model, part(case.inputs(), rank))).backward()
    grads: dict[str, Any] = {name: one.grad for name, one in trainable(model).items() if one.grad is not None}
    found = {name: grad.full_tensor() for name, grad in grads.items()}
    same_gradients(found, reference, max(RTOL, 8 * case.storage.eps), "gradients")
    torch.optim.SGD(trainable(model).values(), lr=0.1).step()
    save(model, folder)
    torch.distributed.barrier()
    whole = load(case.model(), folder)
    stepped = case.attached()
    for name, parameter in trainable(stepped).items():
        parameter.grad = found[name]
    torch.optim.SGD(trainable(stepped).values(), lr=0.1).step()
    wanted = adapter_tensors(stepped, "default")
    for name, value in adapter_tensors(whole, "default").items():
        if value.numel():
            close(value, wanted[name], 2 * case.storage.eps, f"{name} as saved from shards")
