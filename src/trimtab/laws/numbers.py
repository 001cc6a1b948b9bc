"""Laws of sizes, types and storage: count, quantized, dtype, cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab.catalog import matrices
from trimtab.core.code import Code
from trimtab.core.delta import Cast
from trimtab.core.deltas import edited_modules
from trimtab.core.errors import UserError
from trimtab.core.hosts import plain_base
from trimtab.core.merge import merge
from trimtab.core.method import WeightMethod
from trimtab.core.places import Place
from trimtab.core.quantized import dequantize
from trimtab.laws.case import Case, excuses, sites_of
from trimtab.laws.hosts import TOKENS, Alone, Host
from trimtab.laws.judging import close, codes, move, require, same_bits, trainable
from trimtab.laws.law import law
from trimtab.laws.twin import twin


@law(6, "count")
def count(case: Case) -> None:
    """The number of trained values equals the method's formula, on the meta device and off it, and nothing is drawn."""
    formula = 0
    per_site = 0
    for method, sites in sites_of(case, case.model()):
        formula += sum(method.count(site) * matrices(site) for site in sites) + method.count_shared(sites)
        per_site += len(sites) if method.elastic else 0
    for device in ("meta", "cpu"):
        model = case.model(device)
        before = torch.get_rng_state()
        found = trainable(case.attach(model))
        require(torch.equal(torch.get_rng_state(), before), f"attaching on {device} moved the random generator")
        wrong = [name for name, parameter in found.items() if parameter.device.type != device]
        require(not wrong, f"{wrong[:4]} are not on {device}")
        total = sum(parameter.numel() for parameter in found.values())
        slack = per_site if per_site > 1 else 0
        require(abs(total - formula) <= slack, f"{total} values are trained on {device}, the formula says {formula}")


@law(7, "quantized", storages="codes")
def quantized(case: Case) -> None:
    """On codes: gradients as on the decoded weights; merging exact, dense or requantized does what the word says."""
    model = case.attached()
    dense = case.attach(dequantize(case.model()))
    with torch.no_grad():
        for mine, other in zip(trainable(model).values(), trainable(dense).values(), strict=True):
            other.copy_(mine)
        for left, right in zip(model.buffers(), dense.buffers(), strict=True):
            right.copy_(left)
    outputs = []
    for one in (model, dense):
        outputs.append(case.run(one))
        outputs[-1].square().mean().backward()
    close(outputs[0], outputs[1], 1e-5, "output on codes")
    others = trainable(dense)
    for name, parameter in trainable(model).items():
        grad = parameter.grad
        require(
            grad is not None and bool(torch.isfinite(grad).all()), f"the gradient of {name} is missing or not finite"
        )
        close(grad, others[name].grad, 1e-4, f"gradient of {name} on codes")  # type: ignore[arg-type]
    if "merge" not in excuses(case.method):
        with torch.no_grad():
            folds(case, model, outputs[0])


def folds(case: Case, model: nn.Module, output: Tensor) -> None:
    """The three merge policies, from one adapted model, which is used up."""
    before, able, edited = codes(model), can_fold(model), [path for path, _ in edited_modules(model)]
    exact = twin(model)
    try:
        merge(exact)
        require(able, "merge folded into codes although the method declines")
        close(case.run(exact), output, 1e-5, "exactly merged output")
        now, kept = codes(exact), [name for name in before if name.endswith(("codes", "offset"))]
        same_bits({k: now[k] for k in kept}, {k: before[k] for k in kept}, "codes after an exact merge")
        exact = twin(model)
    except UserError:
        require(not able, "the method offers an exact merge, and merge refused")
        same_bits(dict(exact.state_dict()), dict(model.state_dict()), "a refused merge")
        close(case.run(exact), output, 0, "output after a refused merge")
    dense = merge(exact, quantized="dense")
    close(case.run(dense), output, 1e-5, "densely merged output")
    again = merge(model, quantized="requantize")
    for path in edited:
        code = again.get_submodule(path)._modules.get("code")
        if isinstance(code, Code):
            W = plain_base(dense.get_submodule(path), Place(path), 0).weight
            close(code.dense(), Code.of(W.contiguous(), code.format).dense(), 1e-6, f"{path} requantized")


def can_fold(model: nn.Module) -> bool:
    """Whether every quantized site's method says it has an exact merge."""
    offers = []
    for _, module in edited_modules(model):
        code: Any = module._modules.get("code")
        for delta in module.delta.values():  # type: ignore[operator]
            if code is not None:
                method: Any = delta.method
                whole = delta.rows is None and isinstance(method, WeightMethod)
                offers.append(whole and method.merge(code, Cast(delta, torch.float32)) is not None)
    return all(offers)


class Sizes(TorchDispatchMode):
    """Calls `seen(function, output)` for every new tensor an operator makes; views are not new."""

    def __init__(self, seen: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in leaves((args, kwargs)) if leaf.numel()}
        for leaf in leaves(output):
            if leaf.numel() and leaf.untyped_storage().data_ptr() not in given:
                self.seen(function, leaf)
        return output


def leaves(value: Any) -> list[Tensor]:
    """All tensors in nested arguments."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def wide_activations(case: Case, model: nn.Module) -> tuple[list[str], list[str], Tensor]:
    """fp32 tensors of activation size that one forward makes, and those it saves for backward."""
    rows = case.rows
    lengths = {TOKENS, TOKENS + case.virtual_tokens}
    made: list[str] = []
    saved: list[str] = []

    def is_wide(value: Tensor) -> bool:
        big = any(value.numel() % (rows * length) == 0 and value.numel() > rows * length for length in lengths)
        return value.dtype == torch.float32 and big

    def seen(function: Any, value: Tensor) -> None:
        if is_wide(value):
            made.append(f"{function} {tuple(value.shape)}")

    def keep(value: Tensor) -> Tensor:
        if is_wide(value):
            saved.append(str(tuple(value.shape)))
        return value

    with Sizes(seen), torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        output = case.run(model)
    return made, saved, output


@law(8, "dtype", storages="floats")
def dtype(case: Case) -> None:
    """Tensors and outputs follow the base's type; in bf16, also with fp32 masters, no activation is made in fp32."""
    kind = case.storage.dtype
    frozen_made, frozen_saved, frozen = wide_activations(case, case.model())
    for masters in (None, torch.float32) if kind == torch.bfloat16 else (None,):
        model = move(case.attach(case.model(), dtype=masters))
        wanted = masters or kind
        odd = [name for name, one in trainable(model).items() if one.dtype != wanted]
        require(not odd, f"{odd[:4]} are not {wanted}")
        made, saved, output = wide_activations(case, model)
        require(output.dtype == frozen.dtype, f"the output became {output.dtype}, the base gives {frozen.dtype}")
        if kind == torch.bfloat16:
            require(len(made) <= len(frozen_made), f"fp32 activations were made: {news(made, frozen_made)}")
            require(len(saved) <= len(frozen_saved), f"fp32 activations were saved: {news(saved, frozen_saved)}")
        output.float().square().mean().backward()
        grads = [name for name, one in trainable(model).items() if one.grad is None or one.grad.dtype != wanted]
        require(not grads, f"gradients of {grads[:4]} are missing or not {wanted}")


def news(found: list[str], known: list[str]) -> list[str]:
    """What is in one list beyond another."""
    rest = list(found)
    for one in known:
        if one in rest:
            rest.remove(one)
    return rest[:4]


@law(18, "cost", storages="every", host="linear")
def cost(case: Case) -> None:
    """A forward builds no tensor of the weight's size; views aside, and what decoding a quantized weight takes."""
    out, into = 44, 80  # no multiple of the positions, so that no activation has the size of the weight
    build, inputs = (lambda: Alone(nn.Linear(into, out))), (lambda rows: {"x": torch.randn(rows, TOKENS, into)})
    case = replace(case, host=Host("wide", "linear", build, inputs, "layer", ("layer",)), rows=2)

    def built(model: nn.Module) -> list[str]:
        found: list[str] = []

        def seen(function: Any, value: Tensor) -> None:
            decoding = case.storage.format is not None and not torch.is_grad_enabled()
            if value.numel() == out * into and not decoding:
                found.append(f"{function} {tuple(value.shape)}")

        with Sizes(seen):
            case.run(model)
        return found

    more = news(built(case.attached()), built(case.model()))
    require(not more, f"a forward builds {more}")
