"""The processes of one run, and what they have to tell each other.

A run alone is `ALONE`, whose answers are its own: nothing of torch's distributed package is touched then. Else every
process runs the same loop on rows of its own; trained tensors are whole in each, and their gradients are summed
once a step, however many rows a process had. The first process alone writes and prints.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import UserError

BUCKET = 1 << 24
"""Entries of gradients that are summed in one message."""
FROM_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LOST = ("gloo", "nccl", "connection", "timed out", "timeout", "processgroup", "socket", "tcpstore", "broken pipe")
"""Words in what torch says when another process does not answer."""


class Elsewhere(Exception):
    """Another process of the run has an error, and tells it: this one ends without a word."""


class Lost(UserError):
    """Another process of the run is gone or does not answer."""


class Ranks:
    """A process that is alone: what concerns all processes concerns it."""

    rank = 0
    size = 1
    local_size = 1
    device = torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def total(self, number: Any) -> Any:
        """The sum of a number over all processes."""
        return number

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag: whether it is set in any process."""
        return flags

    def add_up(self, parameters: Sequence[Tensor], loss: float) -> float:
        """Sum the gradients of these parameters over all processes, in place, and a loss, which is returned."""
        return loss

    def told(self, what: Callable[[], Any]) -> Any:
        """Do something in the first process only; all get the JSON-like value it returns, or end with its error."""
        return what()

    def handed(self, what: Callable[[], bytes]) -> bytes:
        """As `told`, for bytes."""
        return what()

    def listed(self, values: Sequence[Any]) -> list[Any]:
        """The JSON-like values of all processes, end to end."""
        return list(values)

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """End together: an error of one process inside is the end of all, told by the lowest that has one."""
        yield

    def seed(self, seed: int, step: int) -> None:
        """Before a step: other random numbers in every process, the same after a restart. Alone they just run on."""


ALONE = Ranks()


class Group(Ranks):
    """One of several processes that torch.distributed connects."""

    def __init__(self, device: torch.device) -> None:
        import torch.distributed as dist

        self.dist, self.device = dist, device
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))

    def total(self, number: Any) -> Any:
        return type(number)(self._sum([float(number)])[0])

    def any(self, *flags: bool) -> tuple[bool, ...]:
        return tuple(bool(one) for one in self._sum([float(flag) for flag in flags]))

    @torch.no_grad()
    def add_up(self, parameters: Sequence[Tensor], loss: float) -> float:
        has = [float(parameter.grad is not None) for parameter in parameters]
        loss, *wanted = self._sum([loss, *has])
        grads = [own_gradient(one) for one, count in zip(parameters, wanted, strict=True) if count]
        for bucket in buckets(grads):
            flat = torch.cat([grad.reshape(-1) for grad in bucket])
            self.dist.all_reduce(flat)
            for grad, summed in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
                grad.copy_(summed.view_as(grad))
        return loss

    def told(self, what: Callable[[], Any]) -> Any:
        return json.loads(self.handed(lambda: json.dumps(what()).encode()))

    def handed(self, what: Callable[[], bytes]) -> bytes:
        blob, error = b"", None
        if self.first:
            try:
                blob = what()
            except Exception as found:
                error = found
        head = torch.tensor([len(blob), int(error is not None)], device=self.device)
        self.dist.broadcast(head, 0)
        if int(head[1]):
            raise error or Elsewhere
        body = torch.frombuffer(bytearray(blob), dtype=torch.uint8) if blob else torch.empty(0, dtype=torch.uint8)
        body = (body if self.first else torch.empty(int(head[0]), dtype=torch.uint8)).to(self.device)
        if int(head[0]):
            self.dist.broadcast(body, 0)
        return body.cpu().numpy().tobytes()

    def listed(self, values: Sequence[Any]) -> list[Any]:
        own = torch.frombuffer(bytearray(json.dumps(list(values)).encode()), dtype=torch.uint8).to(self.device)
        lengths = [int(one) for one in self._sum([float(len(own)) * (at == self.rank) for at in range(self.size)])]
        padded = torch.nn.functional.pad(own, (0, max(lengths) - len(own)))
        found = [torch.empty_like(padded) for _ in range(self.size)]
        self.dist.all_gather(found, padded)
        texts = [one[:length].cpu().numpy().tobytes() for one, length in zip(found, lengths, strict=True)]
        return [value for text in texts for value in json.loads(text)]

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        error: Exception | None = None
        try:
            yield
        except Exception as found:
            error = found
        failed = self._sum([float(error is not None and at == self.rank) for at in range(self.size)])
        if any(failed):
            raise error if error is not None and failed.index(1.0) == self.rank else Elsewhere

    def seed(self, seed: int, step: int) -> None:
        torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + self.rank) % 2**63)

    def _sum(self, numbers: Sequence[float]) -> list[float]:
        """The sums of numbers over all processes, in double precision, equal in all."""
        sent = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        self.dist.all_reduce(sent)
        return sent.tolist()


def own_gradient(parameter: Tensor) -> Tensor:
    """The gradient of a parameter; zero where this process's rows gave none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def buckets(grads: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients in the groups that are sent together: of one type, not too large."""
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for grad in grads:
        by_type.setdefault(grad.dtype, []).append(grad)
    for same in by_type.values():
        bucket: list[Tensor] = []
        size = 0
        for grad in same:
            if bucket and size + grad.numel() > BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(grad)
            size += grad.numel()
        if bucket:
            yield bucket


def started_by_torchrun() -> bool:
    """Whether this process is one of several that torchrun has started."""
    return all(name in os.environ for name in FROM_TORCHRUN) and int(os.environ["WORLD_SIZE"]) > 1


@contextmanager
def joined(device: str = "auto", timeout: float = 600.0) -> Iterator[Ranks]:
    """The processes of this run: connected inside, if torchrun has started several; else this one alone.

    A process that does not answer for `timeout` seconds is an error, and so is one that is gone.
    """
    if not started_by_torchrun():
        yield ALONE
        return
    import torch.distributed as dist

    own = dist.is_initialized()
    where = device_of(device)
    try:
        if not own:
            connect(where, timeout)
        yield Group(where)
    except (UserError, Elsewhere, KeyboardInterrupt):
        if not own and where.type == "cpu":  # NCCL's own ending may wait for a process that is gone
            dist.destroy_process_group()
        raise
    except RuntimeError as error:
        if isinstance(error, NotImplementedError) or not any(word in str(error).lower() for word in LOST):
            raise
        silent = "time" in str(error).lower()
        raise Lost(
            f"another process of this run has {f'not answered for {timeout:g} s' if silent else 'ended'}",
            fix="its own message says why; `trimtab tune --resume RUN_DIR`, with as many processes or others, goes on",
        ) from None
    if not own:
        dist.destroy_process_group()


def connect(device: torch.device, timeout: float) -> None:
    """Meet the other processes."""
    from datetime import timedelta

    import torch.distributed as dist

    if os.environ["MASTER_ADDR"] in ("localhost", "127.0.0.1"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    wait = timedelta(seconds=timeout)
    store, rank, size = next(dist.rendezvous("env://", timeout=wait))
    # torchrun's store outlives a restart; without a part of its own, a new process finds the addresses of dead ones
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)


def device_of(name: str) -> torch.device:
    """The device of this process: the GPU of its number on this machine, or the CPU."""
    if name.startswith("cuda") or (name == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if name in ("auto", "cpu"):
        return torch.device("cpu")
    raise UserError(f"device: {name} cannot be shared by several processes", fix="device: cpu or cuda")
