"""Laws of what a model computes: identity, merge, stacks, mixed, recovers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.attach import activate, detach
from trimtab.core.delta import Delta
from trimtab.core.deltas import edited_modules
from trimtab.core.errors import UserError
from trimtab.core.install import INPUT_NAMES
from trimtab.core.merge import merge
from trimtab.core.method import HiddenMethod, WeightMethod
from trimtab.core.site import OpaqueBase
from trimtab.laws.case import Case, excuses, methods_in
from trimtab.laws.judging import close, deltas, move, reads_raw, require, same_bits, trainable
from trimtab.laws.law import law
from trimtab.laws.running import gradients, loss_of, same_gradients
from trimtab.laws.twin import twin

STEPS = 120
"""Adam steps in which a target is recovered."""
LEARNING_RATES = (0.03, 0.1, 0.003, 0.3)
"""Tried one after the other: a method may choose."""
FACTOR = 10.0
"""By how much the loss falls."""


@law(1, "identity", storages="every")
def identity(case: Case) -> None:
    """Attaching changes no output: within 8 units in the last place of the largest value, in bf16 within one."""
    model = case.model()
    with torch.no_grad():
        before = case.run(model)
        units = 8 if case.storage.eps < 1e-6 else 1
        close(case.run(case.attach(model)), before, units * case.storage.eps, "output after attach")


@law(3, "merge", storages="floats")
def merged(case: Case) -> None:
    """The merged model computes what the adapted one did, to 1e-5; a fast forward has the equation's gradients.

    In bf16 the merged weights are those computed in fp32, rounded once.
    """
    model = case.attached()
    if case.storage.eps > 1e-6:
        rounded_once(model)
        return
    base = case.model()
    with torch.no_grad():
        frozen = case.run(base)
    before = case.run(model)
    moved = float((before.detach() - frozen).abs().max())
    require(moved > 1e-3 * float(frozen.abs().max()), "the delta has no effect")
    fast = gradients(model, loss_of(before))
    for delta in deltas(model):
        delta.method = plain(delta.method)
    same_gradients(gradients(model, loss_of(case.run(model))), fast, 1e-4, "fast forward against the equation")
    with torch.no_grad():
        folded = merge(model)
        close(case.run(folded), before, 1e-5, "merged output")
    require(not list(edited_modules(folded)), "adapters are left after merge")
    missing = set(base.state_dict()) - set(folded.state_dict())
    require(not missing, f"merge lost {sorted(missing)}")


def rounded_once(model: nn.Module) -> None:
    """Merging in a narrow type equals merging in fp32 and rounding."""
    wide, narrow = merge(twin(model).float()), merge(model)
    kinds = {name: value.dtype for name, value in narrow.state_dict().items()}
    rounded = {name: value.to(kinds[name]) for name, value in wide.state_dict().items()}
    same_bits(dict(narrow.state_dict()), rounded, "weights merged in a narrow type")


def plain(method: Any) -> Any:
    """A weight method whose forward is the affine map of its own `weight` and `bias`."""
    if not isinstance(method, WeightMethod):
        return method
    cls = type(method)
    twin: Any = object.__new__(type(cls.__name__, (cls,), {"forward": WeightMethod.forward}))
    twin.__dict__.update(method.__dict__)
    return twin


@law(12, "stacks", storages="floats")
def stacks(case: Case) -> None:
    """Two adapters compose: the second sees the first one's edited site as its base; each can be used alone."""
    rtol = max(5e-5 if case.host.kind == "model" else 1e-5, 16 * case.storage.eps)
    model = case.model()
    with torch.no_grad():
        frozen = case.run(model)
        case.attach(model, "first")
        case.attach(move(model), "second", seed=1)
        move(model, seed=4)
        both = case.run(model)
        used = {name: case.run(activate(model, name)) for name in ("first", "second")}
        require(not torch.equal(used["first"], both), "the second adapter has no effect over the first")
        require(not torch.equal(used["first"], used["second"]), "both adapters compute the same")
        close(case.run(activate(model, None)), frozen, 0, "base alone")
        close(case.run(activate(model, ("first", "second"))), both, 0, "both again")
        for name in ("first", "second"):
            rest = twin(model)
            close(case.run(detach(rest, "second" if name == "first" else "first")), used[name], 0, f"{name} left alone")
            if "merge" not in excuses(case.method) and case.storage.eps < 1e-6:
                close(case.run(merge(rest)), used[name], rtol, f"{name} merged alone")
        if all(isinstance(one, HiddenMethod) and "attention" not in one.hosts for one in methods_in(case.method)):
            close(case.run(composed(model)), both, rtol, "second over first")
        elif "merge" not in excuses(case.method) and case.storage.eps < 1e-6:
            close(case.run(merge(twin(model), "first")), both, rtol, "second over the merged first")
            close(case.run(merge(model)), both, rtol, "both merged")


def composed(model: nn.Module) -> nn.Module:
    """A copy in which the first adapter is active and the second is called by hand around its modules."""
    outer = twin(model)
    activate(outer, "first")
    for path, module in list(edited_modules(outer)):
        present: Any = module.delta
        above = next((delta for delta in present.values() if delta.adapter == "second"), None)
        if above is not None:
            parent, _, name = path.rpartition(".")
            outer.get_submodule(parent)._modules[name] = Around(module, above)
    return outer


class Around(nn.Module):
    """A module with one hidden-space delta around it."""

    def __init__(self, module: nn.Module, above: Delta) -> None:
        super().__init__()
        self.module, self.above = module, above

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        deltas: Any = self.module.delta
        batch = deltas.batch
        name = None if args else next(name for name in INPUT_NAMES if name in kwargs)
        x = args[0] if name is None else kwargs.pop(name)
        rows = self.above.rows
        if rows is None:
            base = OpaqueBase(self.module, self.module, batch, args[1:], kwargs, 0)
            y = self.above(x, base)
            return y if base.rest is None else (y, *base.rest)
        whole = self.module(x)
        part = OpaqueBase(self.module, lambda x: rows.of(self.module(x)), batch, (), {}, 0)
        return rows.put(whole, self.above(x, part))


@law(13, "mixed", storages="kinds")
def mixed(case: Case) -> None:
    """A batch with one adapter per row, None among them, computes what a loop over its rows does."""
    wanted: list[Any] = ["first", None, "second", ("first", "second"), "first"]
    model = case.model()
    with torch.no_grad():
        case.attach(model, "first")
        activate(model, None)
        case.attach(model, "second", seed=1)
        move(model)
        inputs = case.inputs(rows=len(wanted))
        if reads_raw(model):
            try:
                activate(model, wanted)
            except UserError:
                return
            require(False, "rows at raw weights were neither mixed nor refused")
        together = case.run(activate(model, wanted), inputs)
        for row, names in enumerate(wanted):
            one = {key: value[row : row + 1] for key, value in inputs.items()}
            alone = case.run(activate(model, names), one)
            rtol = max(2e-5, 16 * case.storage.eps)
            close(real(together[row : row + 1], one), real(alone, one), rtol, f"row {row} ({names})")
        frozen = case.model()
        close(case.run(activate(model, None), inputs), case.run(frozen, inputs), 0, "base alone")


def real(y: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """The outputs at positions that are not padding."""
    mask = inputs.get("attention_mask")
    return y if mask is None or mask.shape != y.shape[:2] else y[mask.bool()]


@law(16, "recovers", thorough=True, slow=lambda case: case.oversized)
def recovers(case: Case) -> None:
    """A target made by the same method with other tensors is learned: the loss falls tenfold within 120 Adam steps."""
    inputs = case.inputs(rows=12)
    with torch.no_grad():
        target = case.run(move(case.attached(moved=False), scale=0.3), inputs)
    reached = {}
    for rate in LEARNING_RATES:
        model = case.attached(moved=False)
        optimizer = torch.optim.Adam(list(trainable(model).values()), lr=rate)
        first = last = float("inf")
        for step in range(STEPS):
            loss = (case.run(model, inputs) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            last = float(loss.detach())
            first = last if step == 0 else first
            if last * FACTOR <= first:
                return
        reached[rate] = first / last
    best = max(reached, key=lambda rate: reached[rate])
    require(False, f"the loss fell {reached[best]:.2g} times at learning rate {best}, not {FACTOR:g}")
