"""Laws of what a model holds: trains-only, detach, save, deterministic, copies."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.attach import activate, attach, detach
from trimtab.core.errors import UserError
from trimtab.core.save import RECORD, TENSORS, adapter_tensors, load, save
from trimtab.laws.case import Case, methods_in, statistics
from trimtab.laws.judging import Broken, bits, close, deltas, move, require, same_bits, trainable
from trimtab.laws.law import law

MEMORY = "/dev/shm"
"""Where there is such a file system, flushing to disk costs nothing."""


@law(2, "trains_only", storages="every")
def trains_only(case: Case) -> None:
    """One step of an optimizer moves every declared tensor and no bit of the base; something can move at the start."""
    model = case.model()
    base = bits(model)
    case.attach(model)
    declared = {id(parameter) for delta in deltas(model) for parameter in delta.parameters()}
    shared = getattr(model, "trimtab_shared", None)
    declared |= {id(parameter) for parameter in shared.parameters()} if shared is not None else set()
    asking = trainable(model)
    require(bool(asking), "nothing is trained")
    outside = [name for name, parameter in asking.items() if id(parameter) not in declared]
    require(not outside, f"trains {outside[:4]}, which are not its own")
    asleep = [n for n, p in model.named_parameters() if id(p) in declared and not p.requires_grad]
    require(not asleep, f"{asleep[:4]} are declared as trained, but ask for no gradient")
    case.run(model).float().square().mean().backward()
    awake = [name for name, parameter in asking.items() if parameter.grad is not None and bool(parameter.grad.any())]
    require(bool(awake), "no tensor gets a gradient at the start, so it would never move")
    move(model)
    model.zero_grad()
    before = {name: parameter.detach().clone() for name, parameter in asking.items()}
    loss = case.run(model).float().square().mean()
    (loss + sum(term for delta in deltas(model) if (term := delta.method.penalty(delta)) is not None)).backward()
    for name, parameter in asking.items():
        require(parameter.grad is not None, f"{name} gets no gradient")
        grad: Any = parameter.grad
        require(bool(torch.isfinite(grad).all()), f"the gradient of {name} is not finite")
        require(bool(grad.any()) or not grad.numel(), f"the gradient of {name} is zero everywhere")
    torch.optim.AdamW(asking.values(), lr=0.1).step()
    still = [name for name, value in before.items() if value.numel() and torch.equal(value, asking[name])]
    require(not still, f"{still[:4]} did not move")
    same_bits(bits(model), base, "base after a step")


@law(4, "detach", storages="kinds")
def detaches(case: Case) -> None:
    """Detaching restores every bit, gradient flag, class, attribute and hook, also after a training step."""
    model = case.model()
    next(iter(model.parameters())).requires_grad_(False)
    before, was = dict(model.state_dict()), shape_of(model)
    before = {name: value.clone() for name, value in before.items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    output = case.run(model).detach()
    move(case.attach(model))
    case.run(model).float().square().mean().backward()
    detach(model)
    same_bits(model.state_dict(), before, "state dict after detach")
    now = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    require(now == flags, f"gradient flags of {[n for n in flags if now.get(n) != flags[n]][:4]} differ")
    for path, facts in shape_of(model).items():
        require(facts == was.get(path), f"{path or 'the model'} is not as before: {facts} instead of {was.get(path)}")
    close(case.run(model), output, 0, "output after detach")


def shape_of(model: nn.Module) -> dict[str, Any]:
    """Class, attribute names, children and hooks of every module."""
    return {
        path: (type(module), sorted(vars(module)), [name for name, _ in module.named_children()], hooks(module))
        for path, module in model.named_modules()
    }


def hooks(module: nn.Module) -> int:
    """How many hooks a module has."""
    return len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)


@law(5, "save", storages="every")
def saves(case: Case) -> None:
    """A saved adapter holds its own tensors only and loads bit for bit; a file that does not fit is refused in full.

    Saved without what only training needs, it computes the same.
    """
    model = case.attached()
    with torch.no_grad():
        output = case.run(model)
    with tempfile.TemporaryDirectory(dir=MEMORY if os.path.isdir(MEMORY) else None) as directory:
        folder = save(model, Path(directory) / "adapter")
        stored = read(folder)
        own = adapter_tensors(model, "default")
        same_bits(dict(sorted(stored.items())), {k: v.detach() for k, v in sorted(own.items())}, "file")
        trained = sum(parameter.numel() for parameter in trainable(model).values())
        kept = [value for value in stored.values() if value.is_floating_point() or value.dtype == torch.uint8]
        held = sum(value.numel() for value in kept)
        require(held >= trained, f"{trained} values are trained, {held} are in the file")
        fresh = load(case.model(), folder)
        same_bits(dict(fresh.state_dict()), dict(model.state_dict()), "state dict after load")
        require(list(trainable(fresh)) == list(trainable(model)), "other tensors are trained after load")
        with torch.no_grad():
            close(case.run(fresh), output, 0, "output after load")
        small = load(case.model(), save(model, Path(directory) / "baked", bake=True))
        with torch.no_grad():
            close(case.run(small), output, 8 * case.storage.eps, "output of what is left when baked")
        for wrong in faults(stored, methods_in(case.method)[0].elastic):
            refused(case, folder, stored, wrong)


def read(folder: Path) -> dict[str, Tensor]:
    """The tensors of a saved adapter."""
    from safetensors.torch import load as from_bytes

    return from_bytes((folder / TENSORS).read_bytes())


def faults(stored: dict[str, Tensor], elastic: frozenset[str]) -> list[Callable[[dict[str, Tensor]], list[str]]]:
    """Ways to damage a file; each returns the keys an error has to name."""
    keys = list(stored)
    firm = [key for key in keys if key.rsplit(".", 1)[-1] not in elastic]

    def lack_and_add(tensors: dict[str, Tensor]) -> list[str]:
        del tensors[keys[0]]
        tensors["stray.one"] = torch.zeros(2)
        if len(firm) > 1:
            tensors[firm[-1]] = torch.zeros(3, 5, 2)
            return [keys[0], "stray.one", firm[-1]]
        return [keys[0], "stray.one"]

    def misshape(tensors: dict[str, Tensor]) -> list[str]:
        tensors[firm[0]] = torch.zeros(3, 5, 2)
        tensors["stray.two"] = torch.zeros(1)
        return [firm[0], "stray.two"]

    return [lack_and_add, misshape] if firm else [lack_and_add]


def refused(
    case: Case, folder: Path, stored: dict[str, Tensor], wrong: Callable[[dict[str, Tensor]], list[str]]
) -> None:
    """Loading a damaged file raises one error that names everything, and changes nothing."""
    from safetensors.torch import save as to_bytes

    tensors = dict(stored)
    named = wrong(tensors)
    blob = to_bytes(tensors)
    record = json.loads((folder / RECORD).read_text())
    broken = folder.parent / f"broken-{wrong.__name__}"
    broken.mkdir()
    (broken / TENSORS).write_bytes(blob)
    (broken / RECORD).write_text(json.dumps(record | {"sha256": hashlib.sha256(blob).hexdigest()}))
    model = case.model()
    before, was = bits(model), shape_of(model)
    try:
        load(model, broken)
    except UserError as error:
        silent = [key for key in named if key not in str(error)]
        require(not silent, f"a load error does not name {silent}")
        same_bits(model.state_dict(), before, "state dict after a refused load")
        require(shape_of(model) == was, "a refused load changed the model")
        return
    raise Broken(f"a file with faults at {named} was loaded")


@law(14, "deterministic")
def deterministic(case: Case) -> None:
    """The start depends on (seed, site name) only: not on the generator's state, the order, or the other sites."""
    torch.manual_seed(1)
    state, other = torch.get_rng_state(), random.getstate()
    one = adapter_tensors(case.attached(moved=False), "default")
    require(torch.equal(torch.get_rng_state(), state), "attach moved torch's random generator")
    require(random.getstate() == other, "attach moved Python's random generator")
    torch.manual_seed(2)
    same_bits(adapter_tensors(case.attached(moved=False), "default"), one, "start under another generator state")
    behind = case.model()
    case.attach(behind, "before", seed=5)
    activate(behind, None)
    case.attach(behind)
    same_bits(adapter_tensors(behind, "default"), one, "start when attached second")
    drawn = {key: value for key, value in one.items() if value.is_floating_point() and varies(value)}
    pairs = [(a, b) for a in drawn for b in drawn if a < b and b != f"{a}0"]  # A0 is where A started
    twins = [(a, b) for a, b in pairs if torch.equal(drawn[a], drawn[b])]
    require(not twins, f"{twins[:2]} start from the same draw")
    alone(case, one)


def varies(value: Tensor) -> bool:
    """Whether a tensor is more than one constant."""
    return value.numel() > 1 and bool((value != value.flatten()[0]).any())


def alone(case: Case, one: dict[str, Tensor]) -> None:
    """One site of several, attached alone, starts as it did among them."""
    method = methods_in(case.method)[0]
    if len(methods_in(case.method)) > 1 or method.elastic:
        return
    model = case.attached(moved=False)
    adapter = model.__dict__["_trimtab"].adapters["default"]
    last = adapter.parts[0].places[-1]
    if len(adapter.parts[0].places) < 2 or last.part or last.parameter:
        return
    hidden = last.kind == "opaque" and last.role is not None  # its path alone may mean the weight of that module
    at = f"{last.role}@{last.layer}" if hidden else last.name
    few = attach(case.model(), method, at, statistics=statistics(case.method, case.host))
    same = {key: value for key, value in adapter_tensors(few, "default").items() if "@shared" not in key}
    same_bits(same, {key: one[key] for key in same}, f"start of {last.name} alone")


@law(17, "copies", storages="kinds")
def copies(case: Case) -> None:
    """pickle and deepcopy give a model that computes the same, is of the same class, and shares nothing."""
    model = case.attached()
    with torch.no_grad():
        output, frozen = case.run(model), case.run(case.model())
        for how, make in (("deepcopy", copy.deepcopy), ("pickle", lambda m: pickle.loads(pickle.dumps(m)))):
            twin = make(model)
            close(case.run(twin), output, 0, how)
            require([type(m) for m in twin.modules()] == [type(m) for m in model.modules()], f"{how}: classes differ")
            for parameter in trainable(twin).values():
                parameter.add_(1.0)
            require(not torch.equal(case.run(twin), output), f"{how}: the copy does not use its own tensors")
            activate(twin, None)
            close(case.run(model), output, 0, f"the model after changing its {how}")
            detach(twin)
            close(case.run(twin), frozen, 0, f"{how}, detached")
            close(case.run(model), output, 0, f"the model after detaching its {how}")
