"""Optimizer: a transform over the parameters of a model, as an ordinary `torch.optim.Optimizer`.

    optimizer = trimtab.Optimizer(model, trimtab.GaLore(rank=64), lr=1e-4, weight_decay=0.01)

It has groups, schedulers, `state_dict` and `step` as torch's own, so a training loop or transformers' Trainer takes it
(`optimizers=(optimizer, None)`, or `optimizer_cls_and_kwargs=(trimtab.Optimizer, {"rule": "galore", "lr": 1e-4})`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.draw import drawing
from trimtab.core.errors import UserError, listing
from trimtab.core.rounded import Values
from trimtab.core.transform import State, Transform, flat, named, wide


class Optimizer(torch.optim.Optimizer):
    """p ← (1 − lr·f·decay) p − lr·f·u, with u from the transform and f its factor for this parameter.

    `params` is a model, its `named_parameters()`, tensors, or groups of them; a transform that goes by names (LoRA+)
    needs names. Decay is decoupled, in the full space, and uses the weight before the step. A parameter without a
    gradient keeps its value, decay included. Steps are computed in fp32 and rounded once to the parameter's type.

    A transform that steps in backward (LOMO) does so from a hook on each parameter: the gradient is used and dropped
    as soon as it is there, and `step()` only ends the step. Then a step has one backward: a second one is an error,
    not a second step. To clip by the norm of all gradients it takes two passes:

        with optimizer.measuring():
            loss(batch).backward()      # nothing steps, only norms are kept
        optimizer.clip(1.0)
        loss(batch).backward()          # the same again, dropout included
        optimizer.step()

    `state_dict` holds tensors only, by dotted name: {"state": {0: {"inner.m": ...}}, ...}.
    """

    def __init__(
        self,
        params: Any,
        rule: str | Transform = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.rule, self.seed = named(rule), seed
        self.indices: dict[Tensor, int] = {}
        self.norms: dict[int, Tensor] = {}
        self.factor: Tensor | None = None
        self.only_measures = False
        self.hooks: list[Any] = []
        if isinstance(params, nn.Module):
            params = [(name, p) for name, p in params.named_parameters() if p.requires_grad]
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        names = group.get("param_names") or [""] * len(group["params"])
        group["factors"] = [self.rule.rate(name, p) for name, p in zip(names, group["params"], strict=True)]
        for at, p in enumerate(group["params"]):
            self.indices[p] = len(self.indices)
            if self.rule.in_backward:
                self.hooks.append(p.register_post_accumulate_grad_hook(self._hook(group, at)))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; in backward they have stepped already."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for at, p in enumerate(group["params"]):
                if p.grad is not None:
                    self._one(p, p.grad, group, at)
        self.norms.clear()
        self.factor = None
        return loss

    def release(self) -> None:
        """Take the hooks off the parameters again, for transforms that step in backward."""
        while self.hooks:
            self.hooks.pop().remove()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """For transforms that step in backward: a backward in here only takes the norms of its gradients."""
        self.only_measures = True
        try:
            yield
        finally:
            self.only_measures = False

    def clip(self, norm: float) -> float:
        """Scale the gradients of the next backward so that their norm is at most `norm`; returns what was measured."""
        measured = self.measured()
        self.factor = (norm / (measured + 1e-6)).clamp(max=1.0)
        self.norms.clear()
        return float(measured)

    def measured(self) -> Tensor:
        """The norm of all gradients of the last backward, for transforms that step in backward."""
        if not self.norms:
            return torch.zeros(())
        first = self.norms[min(self.norms)].device
        return torch.linalg.vector_norm(torch.stack([self.norms[index].to(first) for index in sorted(self.norms)]))

    def state_bytes(self) -> int:
        """Bytes of all states there are now."""
        return sum(one.nbytes for state in self.state.values() for one in flat(state).values())

    def state_dict(self) -> dict[str, Any]:
        found = super().state_dict()
        return found | {"state": {key: flat(state) for key, state in found["state"].items()}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take on a state, bit for bit; a parameter that has none in it starts anew."""
        groups = state_dict["param_groups"]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self.param_groups]:
            raise UserError("optimizer: the state is of other groups of parameters")
        own = ("params", "param_names", "factors")
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update({key: value for key, value in saved.items() if key not in own})
        # torch numbers parameters in the order of the groups, as `indices` does
        keys = [key for group in groups for key in group["params"]]
        states: dict[Tensor, State] = {}
        for p, index in self.indices.items():
            loaded = state_dict["state"].get(keys[index])
            if not loaded:
                continue
            states[p] = self._begin(p)
            fresh = flat(states[p])
            odd = sorted(fresh.keys() ^ loaded.keys())
            odd += [key for key in fresh if key in loaded and fresh[key].shape != loaded[key].shape]
            if odd:
                raise UserError(
                    f"optimizer: parameter {index} has a state of another optimizer than {self.rule}: {listing(odd)}",
                    fix="go on with the optimizer and the settings it was made with",
                )
            for key, value in fresh.items():
                value.copy_(loaded[key])
        self.state.clear()
        self.state.update(states)

    def __getstate__(self) -> dict[str, Any]:
        ours = {key: self.__dict__[key] for key in ("rule", "seed", "indices", "norms", "factor", "only_measures")}
        return super().__getstate__() | ours | {"hooks": []}

    def _begin(self, p: Tensor) -> State:
        with drawing(self.seed, str(self.indices[p]), p.device):
            return self.rule.init(p)

    def _one(self, p: Tensor, g: Tensor, group: Mapping[str, Any], at: int) -> None:
        if g.is_sparse:
            raise UserError("optimizer: a sparse gradient", fix="nn.Embedding(..., sparse=False)")
        g = g.to(wide(p.dtype))
        if self.factor is not None:
            g = g * self.factor.to(g.device)
        if p not in self.state:
            self.state[p] = self._begin(p)
        u = self.rule.update(g, self.state[p], p)
        rate = float(group["lr"]) * group["factors"][at]
        kept = 1 - rate * group["weight_decay"]
        if p.dtype == u.dtype and not isinstance(p, Values):
            (p if kept == 1 else p.mul_(kept)).add_(u, alpha=-rate)
        else:
            p.copy_(p.to(u.dtype, copy=True).mul_(kept).add_(u, alpha=-rate))

    def _hook(self, group: Mapping[str, Any], at: int) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def now(p: Tensor) -> None:
            g, index = p.grad, self.indices[p]
            if g is None:
                raise UserError(
                    "a parameter has two optimizers that step in backward", fix="release() the one that is done"
                )
            if index in self.norms:
                raise UserError(
                    f"{type(self.rule).__name__} steps in backward, and this is a second backward of the same step",
                    fix="no gradient accumulation; one loss, one backward, then optimizer.step()",
                )
            self.norms[index] = torch.linalg.vector_norm(g.to(wide(p.dtype)))
            if not self.only_measures:
                self._one(p, g, group, at)
            p.grad = None

        return now
