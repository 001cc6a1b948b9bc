"""What a recipe's `optimizer` and `active` come to in the loop, and which pairs of choices are refused, and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trimtab.catalog import inner
from trimtab.core.active import Active, Activity, members_of
from trimtab.core.attach import SHARED
from trimtab.core.delta import Delta
from trimtab.core.errors import UserError
from trimtab.core.method import Method
from trimtab.core.optimizer import Optimizer
from trimtab.core.registry import name_of
from trimtab.core.rounded import Values
from trimtab.core.state import Part
from trimtab.core.transform import Transform
from trimtab.train.recipe import Recipe
from trimtab.train.settings import build_named

Ratios = Mapping[str, float]
"""By the label of a part, its learning rate over that of the run; 1 where none is given."""


def rule_of(recipe: Recipe) -> Transform:
    """The optimizer that a recipe names, with its settings."""
    made: Transform = build_named("optim", recipe.optimizer, recipe.optimizer_settings)
    return made


def schedule_of(recipe: Recipe) -> Active | None:
    """The schedule that a recipe names, or None: everything trains always."""
    if not recipe.active:
        return None
    made: Active = build_named("active", recipe.active, recipe.active_settings)
    return made


def ratios_of(parts: Sequence[Part], new: Sequence[str], width: int) -> dict[str, float]:
    """The own rate of every part over that of the first one; a part that is nothing but `new` modules learns as it."""
    first = parts[0].method.rate(width)
    rates = {part.label: part.method.rate(width) for part in parts if {one.module for one in part.places} - set(new)}
    return {label: rate / first for label, rate in rates.items()}


def trained_by(model: nn.Module) -> dict[nn.Parameter, str]:
    """The label of the part that a parameter belongs to, for those of an adapter."""
    held: list[tuple[str, nn.Module]] = [(one.slot, one) for one in model.modules() if isinstance(one, Delta)]
    held += model._modules[SHARED].named_children() if SHARED in model._modules else []  # type: ignore[union-attr]
    return {parameter: slot.partition("/")[2] for slot, group in held for parameter in group.parameters()}


def groups_of(model: nn.Module, rate: float, ratios: Ratios) -> list[dict[str, Any]]:
    """What trains, by name, in a group for each ratio."""
    owners = trained_by(model) if len(set(ratios.values()) | {1.0}) > 1 else {}
    groups: dict[float, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(ratios.get(owners.get(parameter, ""), 1.0), []).append((name, parameter))
    return [{"params": params, "lr": rate * ratio, "ratio": ratio} for ratio, params in groups.items()]


def optimizer_of(recipe: Recipe, model: nn.Module, rate: float, ratios: Ratios) -> torch.optim.Optimizer:
    """The optimizer of a run. AdamW is torch's, whose fused kernel is the same rule."""
    rule = rule_of(recipe)
    groups = groups_of(model, rate, ratios)
    if name_of(type(rule)) == "adamw" and not any(isinstance(p, Values) for p in model.parameters()):
        adam = {key: getattr(rule, key) for key in ("beta1", "beta2", "epsilon")}
        return torch.optim.AdamW(
            groups,
            lr=rate,
            betas=(adam["beta1"], adam["beta2"]),
            eps=adam["epsilon"],
            weight_decay=recipe.weight_decay,
            fused=True,
        )
    return Optimizer(groups, rule, lr=rate, weight_decay=recipe.weight_decay, seed=recipe.seed)


class Updates:
    """The optimizer of a loop and what goes on around it: the rate, what trains, clipping, in one pass or two."""

    def __init__(self, recipe: Recipe, model: nn.Module, rate: float, ratios: Ratios) -> None:
        self.clip_to = recipe.clip or math.inf
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = optimizer_of(recipe, model, rate, ratios)
        schedule = schedule_of(recipe)
        self.activity = None if schedule is None else Activity(model, schedule, self.optimizer, recipe.seed)

    def begin(self, step: int, rate: float) -> None:
        """Before a step: its learning rate, and which layers train."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        if self.activity is not None:
            self.activity.at(step)

    def passes(self) -> Iterator[None]:
        """Forward and backward, once; twice where steps happen in backward and have to know the norm beforehand."""
        if isinstance(self.optimizer, Optimizer) and self.optimizer.rule.in_backward and self.clip_to < math.inf:
            before = random_states()
            with self.optimizer.measuring():
                yield
            self.norm = self.optimizer.clip(self.clip_to)
            put_random_states(before)
        yield

    def clip(self) -> float:
        """After backward: bound the norm of all gradients; returns what it was."""
        if not isinstance(self.optimizer, Optimizer) or not self.optimizer.rule.in_backward:
            return float(torch.nn.utils.clip_grad_norm_(self.trained, self.clip_to))
        return self.norm if self.clip_to < math.inf else float(self.optimizer.measured())

    def close(self) -> None:
        """Leave the model as it was: everything that trained asks for gradients, and nothing hangs on it."""
        for parameter in self.trained:
            parameter.grad = None
            parameter.requires_grad_(True)
        if isinstance(self.optimizer, Optimizer):
            self.optimizer.release()


def random_states() -> list[torch.Tensor]:
    """The states of torch's generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def put_random_states(states: Sequence[torch.Tensor]) -> None:
    """Put the generators back, so that a second pass drops out what the first did."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(list(states[1:]))


# ---------------------------------------------------------------- what does not go together


@dataclass(frozen=True)
class Point:
    """A run's choices, once its model carries what trains."""

    recipe: Recipe
    rule: Transform
    schedule: Active | None
    methods: Sequence[Method]
    model: nn.Module
    processes: int = 1

    @property
    def trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    @property
    def sharded(self) -> bool:
        """Whether the frozen weights are spread over several processes."""
        return self.recipe.shard != "none"

    def decides_alone(self) -> bool:
        """Whether a method, or one inside it, decides something by the rows of its own process."""
        return any(getattr(one, "own_rows", False) for method in self.methods for one in inner(method))

    def measures_again(self) -> bool:
        """Whether a method measures the frozen weights anew while it trains."""
        return any(one.statistics is not None and type(one).due is not Method.due for one in self.methods)

    def trains_most(self) -> bool:
        """Whether more than half as much trains as is frozen."""
        trained = sum(parameter.numel() for _, parameter in self.trained)
        return 3 * trained > sum(parameter.numel() for parameter in self.model.parameters())

    def acts_after_steps(self) -> bool:
        """Whether a method has a penalty, or changes its tensors after a step."""
        own = [(type(one).penalty, type(one).on_step) for one in self.methods]
        return any(penalty is not Method.penalty or on_step is not Method.on_step for penalty, on_step in own)

    def projects_nothing(self) -> bool:
        """Whether a rule that projects matrices finds none whose smaller side is above its rank."""
        ranks = [getattr(one, "rank", None) for one in (self.rule, *self.rule.inners) if hasattr(one, "gap")]
        return any(rank and all(p.ndim != 2 or min(p.shape) <= rank for _, p in self.trained) for rank in ranks)

    def none_is_faster(self) -> bool:
        """Whether a rule that goes by names gives every parameter the same rate."""
        return len({self.rule.rate(name, p) for name, p in self.trained}) == 1

    def none_in_blocks(self) -> bool:
        """Whether nothing that trains is inside a block."""
        layers, members = members_of(self.model)
        return not any(0 <= one.layer < layers for one in members)

    def leaves_outside(self) -> bool:
        """Whether something outside the blocks asks to be trained and never would be."""
        return bool(getattr(self.schedule, "outside", True) is False and not self.none_in_blocks()) and any(
            not 0 <= one.layer < layers for layers, members in [members_of(self.model)] for one in members
        )


@dataclass(frozen=True)
class Refusal:
    """A pair of choices that does not work together."""

    one: str
    other: str
    reason: str
    fix: str
    holds: Callable[[Point], bool]


REFUSALS = (
    Refusal(
        "an optimizer that steps in backward (lomo, ada_lomo, in_backward)",
        "accumulation above 1",
        "every backward is a step of its own, so several would not add up to one",
        "accumulation: 1 with a larger batch_size, or packing",
        lambda at: at.rule.in_backward and at.recipe.accumulation > 1,
    ),
    Refusal(
        "an optimizer that steps in backward (lomo, ada_lomo, in_backward)",
        "a method with a penalty or with work after a step (adalora, relora, ...)",
        "a penalty is a second backward, and after the step the gradients are gone",
        "another optimizer",
        lambda at: at.rule.in_backward and at.acts_after_steps(),
    ),
    Refusal(
        "a schedule of what trains (active)",
        "a method with a penalty or with work after a step (adalora, relora, ...)",
        "both read gradients of all sites, and the layers whose turn it is not have none",
        "leave `active` out",
        lambda at: at.schedule is not None and at.acts_after_steps(),
    ),
    Refusal(
        "a schedule of what trains (active)",
        "a method that trains nothing inside the blocks (prompt tuning, a head alone)",
        "there is nothing to take turns",
        "leave `active` out",
        lambda at: at.schedule is not None and at.none_in_blocks(),
    ),
    Refusal(
        "badam without `outside`",
        "a head, embedding or other tensor outside the blocks that trains",
        "it would never have its turn",
        "active: {name: badam, outside: true}, or a `where` inside the blocks",
        lambda at: at.schedule is not None and at.leaves_outside(),
    ),
    Refusal(
        "lora_plus",
        "a method without a factor B or a vector",
        "all parameters would learn at one rate",
        "optimizer: adamw",
        lambda at: name_of(type(at.rule)) == "lora_plus" and at.none_is_faster(),
    ),
    Refusal(
        "an optimizer that projects matrices (galore, q_galore, apollo)",
        "a method whose matrices all have a side no longer than the projection's rank (lora)",
        "there is nothing to project, so it is the inner optimizer and saves no memory",
        "a smaller --optimizer-rank, or method full",
        lambda at: at.projects_nothing(),
    ),
    Refusal(
        "several processes",
        "an optimizer that steps in backward (lomo, ada_lomo, in_backward)",
        "a gradient is used and dropped before those of the other processes are added to it",
        "another optimizer, or one process",
        lambda at: at.processes > 1 and at.rule.in_backward,
    ),
    Refusal(
        "several processes",
        "a method that decides by its own rows (lora_drop, auto_prompt)",
        "the processes would decide differently",
        "another method, or one process",
        lambda at: at.processes > 1 and at.decides_alone(),
    ),
    Refusal(
        "shard",
        "one process",
        "there is nobody to share the weights with",
        "--nproc with the number of processes, torchrun, or shard: none",
        lambda at: at.processes == 1 and at.sharded,
    ),
    Refusal(
        "shard",
        "a method that trains most weights (full)",
        "what trains is whole in every process, so hardly anything would be spread",
        "shard: none, or a method that trains less",
        lambda at: at.processes > 1 and at.sharded and at.trains_most(),
    ),
    Refusal(
        "shard",
        "a method that measures gradients of frozen weights while it trains (fish_dip)",
        "each process has a part of every weight, and the gradient is of the whole",
        "shard: none, or a method that measures once before it starts (fish_mask)",
        lambda at: at.sharded and at.measures_again(),
    ),
    Refusal(
        "compile",
        "shard",
        "blocks that gather their weights and drop them again are no fixed program",
        "compile: off",
        lambda at: at.recipe.compile != "off" and at.sharded,
    ),
    Refusal(
        "compile",
        "checkpointing: selective",
        "what is kept is chosen among the operators that run, and compiled code runs none",
        "checkpointing: block",
        lambda at: at.recipe.compile != "off" and at.recipe.checkpointing == "selective",
    ),
    Refusal(
        "compile",
        "a method that cannot be compiled (full_int8)",
        "its codes change behind the tensor that a program holds",
        "compile: off",
        lambda at: at.recipe.compile != "off" and any("compiles" in one.laws for one in at.methods),
    ),
)
"""Every pair that is refused before training, as data: `markdown()` is the table of it."""


def refuse(point: Point) -> None:
    """Raise one error for every pair of choices that does not work together."""
    found = [one for one in REFUSALS if one.holds(point)]
    if found:
        told = "; ".join(f"{one.one} does not go with {one.other}: {one.reason}" for one in found)
        raise UserError(f"recipe: {told}", fix="; ".join(dict.fromkeys(one.fix for one in found)))


def markdown() -> str:
    """The refusals as a Markdown table."""
    lines = ["| choice | does not go with | because | instead |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {one.one} | {one.other} | {one.reason} | {one.fix} |" for one in REFUSALS)])


def add_penalties(deltas: Sequence[Delta]) -> None:
    """Add the gradients of the terms that methods put on their own tensors."""
    for term in filter(None, (delta.method.penalty(delta) for delta in deltas)):
        term.backward()
