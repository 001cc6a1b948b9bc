"""Laws of agreement with the paper: oracle and docstring.

An oracle is a NumPy float64 function of the paper's equation, written without looking at the torch code:

    oracle(x, W, b, p, method, context) -> y

at one site, in canonical orientation: x (..., in), W (out, in), b (out) or None, y (..., out). An embedding's x is
one-hot, a convolution's is patches. `p` holds the method's tensors by name, nested groups as dicts, `p["shared"]` what
all sites share. `context` has `kind`, `role`, `h` (the frozen output for x), `prompt` (rows, positions) bool, and for
norms `eps` and `centered`; a hidden-space method at an opaque site gets W = None. `sources` has what the method reads
beside x, by name, where it does.

For an attention, and for the input space at k and v, the equation is one of an attention, so the site is one:
x (rows, positions, width) is its input, `W`, `b` and `p` are dicts by role (q, k, v, o), y is its output, and `context`
has `heads`, `key_heads`, `theta` (for rotary positions) and `mask` (rows, positions). At an embedding or a block x and
y have the reserved positions in front.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.delta import Delta, Group
from trimtab.core.deltas import edited_modules
from trimtab.core.hosts import is_raw, plain_base, raw_weight
from trimtab.core.method import InputMethod
from trimtab.core.places import Place
from trimtab.core.save import deltas_of
from trimtab.core.site import kind_of
from trimtab.core.state import Part
from trimtab.laws.case import FP64, Case, methods_in, title
from trimtab.laws.judging import Broken, NotApplicable, close, require
from trimtab.laws.law import law

ACCURACY = 1e-10


@law(15, "oracle")
def oracle(case: Case) -> None:
    """In float64 every site computes the paper's equation, written separately in NumPy, to 1e-10."""
    if len(methods_in(case.method)) > 1:
        raise NotApplicable("the parts of a preset are checked on their own")
    if case.oracle is None:
        name = title(case.method)
        raise Broken(f"there is no oracle for {name}: its equation in NumPy, in this package tests/oracles/{name}.py")
    case = case.on(FP64)
    model, frozen = case.attached(), case.model()
    inputs = case.inputs()
    seen = watch(model, case, inputs)
    state = model.__dict__["_trimtab"]
    (part,) = state.adapters["default"].parts
    at = list(zip(part.places, deltas_of(model, state, "default", part), strict=True))
    if "attention" in part.method.hosts or (isinstance(part.method, InputMethod) and "linear" in part.method.hosts):
        attention(case, model, part, at, inputs)
        return
    for place, delta in at:
        module = model.get_submodule(place.module)
        if is_raw(module, place) and kind_of(module) != "norm":
            raw(case, frozen, module, place, delta)
        else:
            called(case, frozen, place, delta, seen[place.module], inputs)


def watch(model: nn.Module, case: Case, inputs: dict[str, Tensor]) -> dict[str, tuple[Any, Any, Any, Any]]:
    """Arguments and output of every edited module during one forward, and what passed by elsewhere for it."""
    seen: dict[str, tuple[Any, Any, Any, Any]] = {}
    heard: dict[str, dict[str, Tensor]] = {}
    handles = []
    for path, module in edited_modules(model):

        def before(module: Any, args: Any, path: str = path) -> None:
            heard[path] = dict(module.delta.heard)

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
            seen[path] = (args, kwargs, output, heard[path])

        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(note, with_kwargs=True))
    with torch.no_grad():
        case.run(model, inputs)
    for handle in handles:
        handle.remove()
    return seen


def called(
    case: Case,
    frozen: nn.Module,
    place: Place,
    delta: Delta,
    seen: tuple[Any, Any, Any, Any],
    inputs: dict[str, Tensor],
) -> None:
    """Compare at a module that is called: its input and output are what a hook saw."""
    args, kwargs, output, heard = seen
    module = frozen.get_submodule(place.module)
    with torch.no_grad():
        h = first(module(*args, **kwargs))
    x, y, kind = first(args if args else tuple(kwargs.values())), first(output), kind_of(module)
    if kind == "embedding":
        x = F.one_hot(x, module.num_embeddings).double()  # type: ignore[arg-type]
    if kind == "conv":
        x, y, h = patches(module, x), y.flatten(2).mT, h.flatten(2).mT
    W = b = None
    if kind != "opaque":
        base = plain_base(module, place, 0)
        W, b = base.weight, base.bias
    if place.rows is not None:
        rows = place.rows.of(torch.arange(y.shape[-1])).tolist()
        around = sorted({*range(y.shape[-1])} - {*rows})
        close(y[..., around], h[..., around], 0, f"rows of {place.name} outside the slice")
        y, h, W, b = y[..., rows], h[..., rows], None if W is None else W[rows], None if b is None else b[rows]
    context = {"kind": kind, "role": place.role, "h": numpy(h), "prompt": numpy(inputs.get("attention_mask"))}
    context["sources"] = {name: numpy(value) for name, value in heard.items()}
    if kind == "norm":
        context |= {"eps": module.eps, "centered": isinstance(module, nn.LayerNorm)}
    compare(case, x, W, b, tensors(delta), context, y, place.name)


def raw(case: Case, frozen: nn.Module, module: nn.Module, place: Place, delta: Delta) -> None:
    """Compare at a weight that is read: what it does to random inputs."""
    layout = raw_weight(module, place)
    with torch.no_grad():
        edited = layout.canonical(getattr(module, layout.name))
        b_edited = getattr(module, layout.bias_name, None) if layout.bias_name else None
    base = plain_base(frozen.get_submodule(place.module), place, 0)
    W, b = base.weight, base.bias
    if place.rows is not None:
        rows = place.rows.of(torch.arange(W.shape[-2])).tolist()
        W, edited = W[..., rows, :], edited[..., rows, :]
        b, b_edited = (None if one is None else one[..., rows] for one in (b, b_edited))
    x = torch.randn(6, W.shape[-1], generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    context = {"kind": "linear", "role": place.role, "h": None, "prompt": None}
    if layout.kind != "experts":
        compare(case, x, W, b, tensors(delta), context, F.linear(x, edited, b_edited), place.name)
        return
    for expert in range(W.shape[0]):
        p = one_of(tensors(delta), expert)
        c, c_edited = (None if one is None else one[expert] for one in (b, b_edited))
        y = F.linear(x, edited[expert], c_edited)
        compare(case, x, W[expert], c, p, context, y, f"{place.name}[{expert}]")


def attention(
    case: Case, model: nn.Module, part: Part, at: list[tuple[Place, Delta]], inputs: dict[str, Tensor]
) -> None:
    """Compare the attention modules of this package's own decoder."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    modules = {path: module for path, module in model.named_modules() if path.endswith("self_attn")}
    if not modules or not all(hasattr(module, "key_heads") for module in modules.values()):
        raise NotApplicable("the oracle of an input method is written for the laws' own decoder")
    handles = [
        module.register_forward_hook(lambda m, args, y, path=path: seen.update({path: (args[0], y)}))
        for path, module in modules.items()
    ]
    with torch.no_grad():
        case.run(model, inputs)
    for handle in handles:
        handle.remove()
    reserved = case.virtual_tokens
    for path, (x, y) in seen.items():
        module: Any = modules[path]
        projections = {role: getattr(module, f"{role}_proj") for role in "qkvo"}
        W = {role: numpy(one._parameters["weight"]) for role, one in projections.items()}
        b = {role: numpy(one._parameters["bias"]) for role, one in projections.items()}
        p = {place.role: tensors(delta) for place, delta in at if place.module.startswith(path)}
        context = {"heads": module.heads, "key_heads": module.key_heads, "theta": 100.0}
        mask = inputs["attention_mask"].bool()
        assert case.oracle is not None
        expected = case.oracle(numpy(x[:, reserved:]), W, b, p, part.method, context | {"mask": numpy(mask)})
        close(y[:, reserved:][mask], torch.as_tensor(expected)[mask], ACCURACY, f"{path} against the oracle")


def compare(
    case: Case,
    x: Tensor,
    W: Tensor | None,
    b: Tensor | None,
    p: dict[str, Any],
    context: dict[str, Any],
    y: Tensor,
    at: str,
) -> None:
    """One site against the oracle."""
    assert case.oracle is not None
    expected = case.oracle(numpy(x), numpy(W), numpy(b), p, methods_in(case.method)[0], context)
    close(y, torch.as_tensor(expected), ACCURACY, f"{at} against the oracle")


def tensors(group: Any) -> dict[str, Any]:
    """The tensors of a delta as NumPy arrays, nested as they are in the method."""
    found: dict[str, Any] = {}
    for name, value in [*group._parameters.items(), *group._buffers.items()]:
        found[name] = numpy(value)
    for name, inner in group._modules.items():
        found[name] = tensors(inner)
    shared = group.__dict__.get("shared")
    return found | {"shared": tensors(shared)} if isinstance(shared, Group) else found


def one_of(stacked: dict[str, Any], expert: int) -> dict[str, Any]:
    """The tensors of one expert out of stacked ones."""
    return {
        key: value if key == "shared" else one_of(value, expert) if isinstance(value, dict) else value[expert]
        for key, value in stacked.items()
    }


def numpy(value: Tensor | None) -> Any:
    """A tensor as a NumPy array; None stays None."""
    return None if value is None else value.detach().clone().numpy()


def first(value: Any) -> Any:
    """The first of a tuple, or the thing itself."""
    return value[0] if isinstance(value, tuple) else value


def patches(module: Any, x: Tensor) -> Tensor:
    """What a convolution multiplies: (rows, places, in · kernel)."""
    return F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).mT


@law(19, "docstring", once=True)
def docstring(case: Case) -> None:
    """The docstring has the equation first, the shape and start of each tensor, the cost, the word, and the paper."""
    for method in methods_in(case.method):
        cls = type(method)
        text = cls.__doc__ or ""
        lines = text.strip().splitlines() or [""]
        problems = [
            None if re.search(r"[=←]", lines[0]) else "the first line is no equation (no = or ←)",
            None if re.search(r"\([^()]*\w+[^()]*\)", text) else "no shape, like (rank, in)",
            None if re.search(r"~|start|init|zero|drawn|copies", text) else "nothing on how the tensors start",
            None if re.search(r"[Cc]ost|multiplication|[Aa]ddition|[Tt]rains|[Aa]dds", text) else "nothing on the cost",
        ]
        plain = " ".join(text.split()).lower()
        word = "mergeable" if method.mergeable else "not mergeable"
        said = re.search(r"(?<!not )mergeable" if method.mergeable else word, plain)
        problems.append(None if said else f"it does not say that it is {word}")
        named = re.findall(r"\b\d{4}\.\d{4,5}\b", text)
        problems.append(
            None
            if not cls.paper or cls.paper in named
            else f"arXiv {cls.paper} is its `paper`; the docstring has {named}"
        )
        found = [problem for problem in problems if problem]
        require(not found, f"{cls.__name__}: " + "; ".join(found))
