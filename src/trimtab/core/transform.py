"""The update axis: a transform is a frozen dataclass of settings that turns a gradient into a step, p ← p − lr·u.

    init(p) -> s              the state of one parameter: tensors by name, or dicts of them
    update(g, s, p) -> u      the step before the learning rate; changes `s` in place, and neither `g` nor `p`

A transform may be made of others: `Chain` runs several, `GaLore(inner=...)` runs one on a projected gradient, `Paged`
keeps another's state elsewhere. `trimtab.core.optimizer.Optimizer` drives one over the parameters of a model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.registry import find

State = dict[str, Any]
COUNTER = 8
"""Bytes of the step counter, an int64 that stays on the CPU."""


@dataclass(frozen=True)
class Transform(ABC):
    """Abstract base of updates; the fields of a subclass are its settings, hence also its JSON and its flags."""

    paper: ClassVar[str] = ""
    """arXiv id."""
    learning_rate: ClassVar[float] = 1.0
    """Factor on a method's default learning rate, which is meant for AdamW."""
    reads_weight: ClassVar[bool] = False
    """Whether `update` reads the values of p, so that it cannot run on a projected gradient."""

    def init(self, p: Tensor) -> State:
        """The state before the first step; none by default. Random draws are seeded by the parameter's place."""
        return {}

    @abstractmethod
    def update(self, g: Tensor, s: State, p: Tensor) -> Tensor:
        """The step u of p ← p − lr·u, in the type of `g`, which is fp32 at least."""

    def state_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of the state of a parameter of this shape, by the formula of the docstring."""
        return sum(one.state_bytes(shape) for one in self.inners)

    @property
    def inners(self) -> tuple[Transform, ...]:
        """The transforms this one is made of."""
        return ()

    @property
    def in_backward(self) -> bool:
        """Whether each parameter steps inside backward, as soon as its gradient is there."""
        return any(one.in_backward for one in self.inners)

    @property
    def relative_rate(self) -> float:
        """`learning_rate`, times that of what it is made of."""
        return self.learning_rate * math.prod(one.relative_rate for one in self.inners)

    def rate(self, name: str, p: Tensor) -> float:
        """Factor on the learning rate of one parameter, by its name."""
        return math.prod(one.rate(name, p) for one in self.inners)

    def touches_weight(self) -> bool:
        """Whether this or anything it is made of reads the weight."""
        return self.reads_weight or any(one.touches_weight() for one in self.inners)


def named(rule: str | Transform) -> Transform:
    """The transform that a setting means: itself, or a registered one with its defaults."""
    made: Transform = _default(rule) if isinstance(rule, str) else rule
    if not isinstance(made, Transform):
        raise UserError(f"expected an optimizer, found {rule!r}", fix='for example trimtab.AdamW(), or "adamw"')
    return made


@cache
def _default(name: str) -> Transform:
    made: Transform = find(name, "optim")()
    return made


def zeros(p: Tensor, *shape: int) -> Tensor:
    """Zeros like p, or of a shape on its device, in fp32; in fp64 for an fp64 parameter."""
    return torch.zeros(shape or p.shape, dtype=wide(p.dtype), device=p.device)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type steps are computed in: fp32, or fp64 for fp64."""
    return dtype if dtype == torch.float64 else torch.float32


def counter() -> Tensor:
    """A step counter at 0."""
    return torch.zeros((), dtype=torch.int64, device="cpu")


def tick(s: State) -> int:
    """Advance the step counter `t` of a state and return it: 1 at the first step."""
    s["t"] += 1
    return int(s["t"])


def size(shape: Sequence[int]) -> int:
    """Number of values of a shape."""
    return math.prod(shape)


def within(rule: Transform, field: str, low: float, high: float) -> None:
    """Refuse a setting that is not in [low, high)."""
    value = getattr(rule, field)
    if not low <= value < high:
        end = "" if high == math.inf else f" and below {high:g}"
        raise UserError(f"{type(rule).__name__}: {field}={value!r} is not {low:g} or more{end}")


def flat(s: State, prefix: str = "") -> dict[str, Tensor]:
    """A state as tensors by dotted name."""
    found: dict[str, Tensor] = {}
    for key, value in s.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
