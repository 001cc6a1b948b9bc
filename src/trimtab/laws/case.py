"""What a law is checked on: a method, a host and a storage; and what comes out of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.attach import attach, reads_batch
from trimtab.core.draw import site_at
from trimtab.core.errors import UserError
from trimtab.core.format import Format
from trimtab.core.method import InputMethod, Method, Placed, WeightMethod
from trimtab.core.part import Attachable, plan
from trimtab.core.quantized import quantize, quantize_module
from trimtab.core.registry import find, name_of, names
from trimtab.core.state import State
from trimtab.laws.hosts import ROWS, Host, zoo
from trimtab.laws.judging import move
from trimtab.laws.twin import twin

LIMIT = 4
"""The largest integer setting on a tiny host."""


@dataclass(frozen=True)
class Storage:
    """How a host's weights are kept: a floating type, and a format on its coded layers if there is one."""

    name: str
    format: Format | None = None
    dtype: torch.dtype = torch.float32

    @property
    def eps(self) -> float:
        """Spacing of numbers near 1."""
        return torch.finfo(self.dtype).eps


@cache
def storages() -> tuple[Storage, ...]:
    """fp32, bf16, and the formats of this package that a delta can sit on."""
    absmax, nf4, affine = (find(name, "storage") for name in ("absmax", "nf4", "affine"))
    return (
        Storage("fp32"),
        Storage("bf16", dtype=torch.bfloat16),
        Storage("int8", absmax()),
        Storage("nf4", nf4()),
        Storage("nf4_double", nf4(double=True)),
        Storage("affine", affine(group_size=LIMIT)),
    )


FP32 = Storage("fp32")
FP64 = Storage("fp64", dtype=torch.float64)


def small(method: Any) -> Any:
    """A method with settings for tiny hosts, nested ones too.

    Integers above 4 become 4, but `blocks`, which divide one of them, 2; a `density` a tenth, and `alpha` at most twice
    the rank: noise on every tensor would otherwise outgrow the weights, and with them what rounding leaves of a
    comparison.
    """
    if isinstance(method, Placed):
        return Placed(small(method.method), method.where)
    if isinstance(method, Sequence):
        return tuple(small(one) for one in method)
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if field.name == "blocks" and value > 2:
            changes[field.name] = 2
        elif isinstance(value, int) and not isinstance(value, bool) and value > LIMIT:
            changes[field.name] = LIMIT
        elif field.name == "density" and value < 0.1:
            changes[field.name] = 0.1
        elif isinstance(value, Method):
            changes[field.name] = small(value)
    rank, alpha = changes.get("rank", getattr(method, "rank", None)), getattr(method, "alpha", 0.0)
    if rank is not None and alpha > 2 * rank:
        changes["alpha"] = 2.0 * rank
    return dataclasses.replace(method, **changes) if changes else method


def methods_in(method: Attachable) -> list[Method]:
    """The methods of an attachment, presets included."""
    listed = [method] if isinstance(method, Method | Placed) else list(method)
    return [one.method if isinstance(one, Placed) else one for one in listed]


def title(method: Attachable) -> str:
    """The registered name, or the names of the parts of a preset."""
    return "+".join(name_of(type(one)) for one in methods_in(method))


def excuses(method: Attachable) -> dict[str, str]:
    """The laws that an attachment does not obey, by its own word, with reasons."""
    return {law: reason for one in methods_in(method) for law, reason in one.laws.items()}


def fits(method: Attachable, host: Host, storage: Storage) -> bool:
    """Whether the laws speak of this method on this host in this storage."""
    if storage.format is not None and not host.coded:
        return False
    if any(one.on_bias for one in methods_in(method)) and not biased(method, host):
        return False
    if host.kind == "model":
        return True
    if not isinstance(method, Method) or isinstance(method, InputMethod):
        return False
    if host.kind in ("raw", "experts"):
        if not isinstance(method, WeightMethod) or "linear" not in method.hosts:
            return False
        edits = type(method).weight is not WeightMethod.weight
        return host.kind == "raw" or (method.stackable and edits and not method.elastic)
    return host.kind in method.hosts


@dataclass(frozen=True)
class Case:
    """One method on one host in one storage. Everything it makes is made from fixed seeds."""

    method: Attachable
    host: Host
    storage: Storage = FP32
    oracle: Callable[..., Any] | None = None
    rows: int = ROWS

    @property
    def id(self) -> str:
        return f"{title(self.method)}-{self.host.name}-{self.storage.name}"

    def on(self, storage: Storage) -> Case:
        """The same in another storage."""
        return dataclasses.replace(self, storage=storage)

    # ------------------------------------------------------------------------------------------------ making things

    def model(self, device: str = "cpu") -> nn.Module:
        """A fresh host in eval mode, its vectors (biases, gains) away from 0 and 1, in its storage."""
        return twin(_built(self.host, self.storage, device))

    def inputs(self, seed: int = 11, rows: int | None = None) -> dict[str, Tensor]:
        """Inputs for the host, in its floating type."""
        made, kind = _inputs(self.host, seed, rows or self.rows), self.storage.dtype
        return {key: value.to(kind) if value.is_floating_point() else value for key, value in made.items()}

    def attach(
        self, model: nn.Module, name: str = "default", seed: int = 0, dtype: torch.dtype | None = None
    ) -> nn.Module:
        """Attach the method where it goes on this host."""
        measured = statistics(self.method, self.host)
        return attach(model, self.method, self.host.where, name=name, seed=seed, dtype=dtype, statistics=measured)

    def attached(self, moved: bool = True) -> nn.Module:
        """A fresh host with the method on it, its tensors moved off their start unless told otherwise."""
        model = self.attach(self.model())
        return move(model) if moved else model

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> Tensor:
        """The output of one forward."""
        return self.host.output(model(**(self.inputs() if inputs is None else inputs)))

    @property
    def oversized(self) -> bool:
        """Whether the host is a whole model although a part of one would do for this method."""
        return self.host.kind == "model" and not any(reads_batch(one) for one in methods_in(self.method))

    @property
    def virtual_tokens(self) -> int:
        """Reserved positions a forward has."""
        return sum(one.virtual_tokens for one in methods_in(self.method) if isinstance(one, InputMethod))


def biased(method: Attachable, host: Host) -> bool:
    """Whether a method that edits biases finds one on a host."""
    try:
        plan(_built(host, FP32, "cpu"), method, host.where)
    except UserError:
        return False
    return True


class seeded:
    """Context in which torch's generator starts from a seed; its state comes back."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self.before = torch.get_rng_state()
        torch.random.default_generator.manual_seed(self.seed)

    def __exit__(self, *error: object) -> None:
        torch.set_rng_state(self.before)


@cache
def _built(host: Host, storage: Storage, device: str) -> nn.Module:
    with seeded(7), torch.device(device):
        model = host.build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    model = model.to(storage.dtype)
    if storage.format is not None and tuple(host.coded) == ("all-linear",):
        return quantize(model, storage.format)
    if storage.format is not None:
        for path in host.coded:
            quantize_module(model.get_submodule(path), storage.format)
    return model


@cache
def _inputs(host: Host, seed: int, rows: int) -> dict[str, Tensor]:
    with seeded(seed):
        return host.inputs(rows)


@cache
def _statistics(method: Attachable, host: Host) -> Mapping[str, Tensor]:
    import importlib

    case = Case(method, host)
    measured: dict[str, Tensor] = {}
    for one in methods_in(method):
        if one.statistics is not None:
            model = case.model()
            measure = getattr(importlib.import_module("trimtab"), one.statistics)
            where = host.where or one.where
            measured |= measure(model, [case.inputs()], where, loss=lambda m, row: case.run(m, row).square().mean())
    return measured


def statistics(method: Attachable, host: Host) -> Mapping[str, Tensor]:
    """What a method wants measured on a host first (`fisher`), from its dense weights."""
    return _statistics(method, host) if any(one.statistics for one in methods_in(method)) else {}


def cases(
    method: Attachable, hosts: Iterable[Host] | None = None, formats: Iterable[Storage] | None = None
) -> list[Case]:
    """Every host and storage that the laws speak of for one method."""
    found = zoo() if hosts is None else tuple(hosts)
    kept = storages() if formats is None else tuple(formats)
    return [Case(method, host, storage) for host in found for storage in kept if fits(method, host, storage)]


def registered() -> dict[str, Method]:
    """Every method of the registry with small settings."""
    return {name: small(find(name)()) for name in names("methods")}


def sites_of(case: Case, model: nn.Module) -> list[Any]:
    """The sites a method would get on a fresh model, part by part."""
    return [
        (part.method, [site_at(model, State(), place, index) for index, place in enumerate(part.places)])
        for part in plan(model, case.method, case.host.where)
    ]
