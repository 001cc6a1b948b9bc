"""Laws of running: checkpointing, compiles, in_place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from trimtab.core.deltas import edited_modules
from trimtab.laws.case import Case
from trimtab.laws.judging import NotApplicable, close, require, trainable
from trimtab.laws.law import law

BACKEND = "aot_eager"
"""Traces forward and backward as inductor does, without generating code."""


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss by tensor name; those of earlier calls are dropped."""
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in trainable(model).items() if parameter.grad is not None}


def loss_of(output: Tensor) -> Tensor:
    """A loss that depends on every output."""
    return output.float().square().mean() + output.float().mean()


def same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float, what: str) -> None:
    """Equal names and values, within rtol of a tensor's own largest gradient, or of a hundredth of all."""
    odd = sorted(set(found) ^ set(expected))
    require(not odd, f"{what}: {odd[:4]} have gradients only in one of two ways")
    floor = 0.01 * max(float(grad.abs().max()) for grad in expected.values() if grad.numel())
    for name, grad in expected.items():
        if grad.numel():
            own = float(grad.abs().max())
            close(found[name], grad, rtol * max(1.0, floor / max(own, 1e-30)), f"{what}: gradient of {name}")


def shorter(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch of texts without its first two positions, so that its shape differs in every way."""
    return {key: value[:, 2:] if value.ndim == 2 else value for key, value in inputs.items()}


def recomputing(case: Case, model: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
    """A forward that keeps no activations: by the model's own switch, or with the whole model recomputed."""
    own = [module for module in model.modules() if hasattr(module, "checkpointing")]
    if hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    elif own:
        for module in own:
            module.checkpointing = True  # type: ignore[assignment]
    else:

        def whole(inputs: dict[str, Tensor]) -> Tensor:
            return torch.utils.checkpoint.checkpoint(lambda: case.run(model, inputs), use_reentrant=False)

        return whole
    return lambda inputs: case.run(model, inputs)


@law(9, "checkpointing", storages="kinds")
def checkpointing(case: Case) -> None:
    """Recomputing activations in backward gives the same gradients, also when two batches wait for their backward."""
    model = case.attached().train()
    first, second = case.inputs(), shorter(case.inputs(seed=12, rows=case.rows - 1))

    def both(run: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        return loss_of(run(first)) + loss_of(run(second))

    expected = gradients(model, both(lambda inputs: case.run(model, inputs)))
    found = gradients(model, both(recomputing(case, model)))
    same_gradients(found, expected, max(1e-5, 8 * case.storage.eps), "recomputed")


def takes_seconds(case: Case) -> bool:
    """Whether compiling a case is left to the slow run: a whole model, a slice, a format but on one layer."""
    usual = case.storage.name == "fp32" and case.host.name != "slice"
    return case.oversized or not (usual or (case.storage.name == "nf4" and case.host.name == "linear"))


@law(10, "compiles", storages="every", thorough=True, slow=takes_seconds)
def compiles(case: Case) -> None:
    """torch.compile takes the model in one graph, and its outputs and gradients are the eager ones."""
    same_compiled(case, BACKEND)


def same_compiled(case: Case, backend: str) -> None:
    """Compare a compiled model with the eager one."""
    model = case.attached().train()
    eager = case.run(model)
    expected = gradients(model, loss_of(eager))
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, fullgraph=True, backend=backend)
    output = case.run(compiled)
    rtol = max(1e-5, 8 * case.storage.eps)
    close(output, eager, rtol, "compiled output")
    same_gradients(gradients(model, loss_of(output)), expected, 10 * rtol, "compiled")


@law(20, "in_place", storages="kinds")
def in_place(case: Case) -> None:
    """What a place gives can be changed in place and through a view, as models may do, with gradients as without."""
    expected, wanted = written(case, lambda y: y * 1.5)
    found, got = written(case, lambda y: y.transpose(0, -1).mul_(1.5).transpose(0, -1))
    rtol = max(1e-5, 8 * case.storage.eps)
    close(found, expected, rtol, "output, changed in place")
    same_gradients(got, wanted, rtol, "changed in place")


def written(case: Case, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of a model in which what each place gives is changed."""
    model, changed = case.attached(), []

    def after(module: nn.Module, args: Any, y: Any) -> Any:
        first, *others = y if isinstance(y, tuple) else (y,)
        if not isinstance(first, Tensor):
            return y
        changed.append(module)
        return (change(first), *others) if isinstance(y, tuple) else change(first)

    for _, module in edited_modules(model):
        module.register_forward_hook(after)
    output = case.run(model)
    if not changed:
        raise NotApplicable("no place gives a tensor of its own")
    return output, gradients(model, loss_of(output))
