"""The schedule axis: which layers train at which step. A schedule is a frozen dataclass with one pure function of time.

It acts on parameters, whatever they are: those of a `Full` delta, of any other method, or a model's own. A parameter
belongs to the block its path runs through; what comes before the first block (embeddings) is layer −1, what comes
after the last (final norm, head, tensors shared by all sites) layer N. Several stacks are numbered through.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.places import places
from trimtab.core.transform import Transform


@dataclass(frozen=True)
class Active(ABC):
    """Abstract base of schedules; the fields of a subclass are its settings, hence also its JSON and its flags."""

    paper: ClassVar[str] = ""
    """arXiv id."""
    resets: ClassVar[bool] = False
    """Whether all optimizer state is dropped at a switch, and not that of the layers which stop training only."""

    every: int = 20
    """Steps between switches."""

    def __post_init__(self) -> None:
        problems = [f"{key}={value!r}" for key, value in vars(self).items() if type(value) is int and value < 1]
        if problems:
            raise UserError(f"{type(self).__name__}: {', '.join(problems)} is below 1")

    @abstractmethod
    def on(self, step: int, layers: int, seed: int) -> frozenset[int]:
        """The layers that train at a step, counted from 0, of a model with so many; −1 and `layers` are the outside."""

    def switches(self, step: int) -> bool:
        """Whether the layers are chosen anew before this step."""
        return step % self.every == 0

    def shuffled(self, layers: int, seed: int, turn: int) -> list[int]:
        """The layers in an order that depends on (seed, turn) only, so that a resumed run draws the same."""
        digest = hashlib.sha256(f"{seed}:{turn}".encode()).digest()
        draw = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randperm(layers, generator=draw, device="cpu").tolist()


class Member(NamedTuple):
    """A parameter that trains when its layer does."""

    name: str
    parameter: Tensor
    layer: int


class Activity:
    """A schedule over the trainable parameters of a model and their optimizer. Call `at(step)` before each step.

        optimizer = trimtab.Optimizer(model, "adamw", lr=1e-5)      # made first: it has to know all of them
        activity = trimtab.Activity(model, trimtab.LISA(layers=2), optimizer)
        for step in range(steps):
            activity.at(step)
            ...

    What stops training asks for no gradient, has none left, and no optimizer state: it starts anew when its turn comes,
    step counter included. `at` depends on the step alone, so after a resume it goes on as it would have.
    """

    def __init__(self, model: nn.Module, schedule: Active, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
        self.schedule, self.optimizer, self.seed = schedule, optimizer, seed
        self.layers, self.members = members_of(model)
        name = type(schedule).__name__
        if not self.layers:
            raise UserError(f"{name}: {type(model).__name__} has no blocks that could take turns")
        if not any(0 <= member.layer < self.layers for member in self.members):
            raise UserError(f"{name}: nothing that trains is inside a block", fix='where="all-linear", or without it')
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        lost = [member.name for member in self.members if id(member.parameter) not in known]
        if lost:
            raise UserError(
                f"{name}: the optimizer does not know {len(lost)} of {len(self.members)} parameters, first {lost[0]}",
                fix="make the optimizer before anything is frozen, with all that trains",
            )

    def on(self, step: int) -> list[Member]:
        """The parameters that train at a step."""
        chosen = self.schedule.on(step, self.layers, self.seed)
        return [member for member in self.members if member.layer in chosen]

    def at(self, step: int) -> None:
        """Have exactly the parameters of this step train, and free what the others held."""
        chosen = {id(member.parameter) for member in self.on(step)}
        anew = self.schedule.resets and self.schedule.switches(step)
        for member in self.members:
            p, trains = member.parameter, id(member.parameter) in chosen
            if anew or not trains:
                self.optimizer.state.pop(p, None)
            if not trains:
                p.grad = None
            p.requires_grad_(trains)

    def heaviest(self, steps: int | None = None) -> int:
        """The step, of so many (None: of two rounds), that needs most memory: its backward reaches lowest."""
        rounds = 2 * self.schedule.every * (self.layers + 1)
        turns = range(0, min(steps or rounds, rounds), self.schedule.every)

        def depth(step: int) -> tuple[int, int]:
            members = self.on(step)
            lowest = min((one.layer for one in members), default=self.layers)
            return lowest, -sum(one.parameter.numel() for one in members)

        return min(turns, key=depth)

    def state_bytes(self, step: int, rule: Transform) -> int:
        """Bytes of optimizer state at a step, by the formula of the rule: that of the parameters which train."""
        return sum(rule.state_bytes(member.parameter.shape) for member in self.on(step))

    def never(self, steps: int) -> list[str]:
        """What is outside of the blocks and trains at none of so many steps."""
        chosen = [
            self.schedule.on(step, self.layers, self.seed) for step in range(steps) if self.schedule.switches(step)
        ]
        ever = frozenset().union(*chosen)
        return [one.name for one in self.members if not 0 <= one.layer < self.layers and one.layer not in ever]


def members_of(model: nn.Module) -> tuple[int, list[Member]]:
    """Number of blocks, and every parameter that asks for a gradient with the layer it belongs to."""
    blocks = [place.module for place in places(model) if place.role == "block"]
    order = {path: index for index, path in enumerate(dict.fromkeys(blocks))}
    found, reached = [], False
    for name, parameter in model.named_parameters():
        layer = next((order[path] for path in beginnings(name) if path in order), None)
        reached |= layer is not None
        if parameter.requires_grad:
            found.append(Member(name, parameter, layer if layer is not None else len(order) if reached else -1))
    return len(order), found


def beginnings(name: str) -> list[str]:
    """`a`, `a.b` and so on of a dotted name."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]
