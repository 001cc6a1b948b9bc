"""Quantized weights inside a model: right products, nothing dense kept, in and out again, saved and rebuilt."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.code import Code
from trimtab.core.errors import UserError
from trimtab.core.format import Format
from trimtab.core.quantized import (
    dequantize,
    dequantize_module,
    describe,
    quantize,
    quantize_module,
    quantized_modules,
    rebuild,
)
from trimtab.storage.absmax import Absmax
from trimtab.storage.affine import Affine
from trimtab.storage.dense import Dense
from trimtab.storage.dynamic8 import Dynamic8
from trimtab.storage.n_of_m import NOfM
from trimtab.storage.nf4 import NF4
from trimtab.storage.pruned import Pruned

FORMATS: list[Format] = [
    NF4(),
    NF4(double=True),
    Absmax(),
    Absmax(64),
    Dynamic8(),
    Affine(),
    Affine(3),
    Dense("float32"),
    Pruned(),
    NOfM(),
]
every = pytest.mark.parametrize("method", FORMATS, ids=str)


class Conv1D(nn.Module):
    """The layer of GPT-2 that keeps its weight as (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.02)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(32, 64), nn.Linear(64, 32, bias=False), nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(32, 50, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(ids)))

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@dataclass
class At:
    """A place as the resolver of `where` returns it."""

    module: str
    part: str | None = None
    parameter: str | None = None


def linears(model: nn.Module, where: Any) -> list[At]:
    return [At(path) for path, module in model.named_modules() if isinstance(module, nn.Linear)]


def only(*paths: str) -> Callable[[nn.Module, Any], list[At]]:
    return lambda model, where: [At(path) for path in paths]


def linear(method: Format, out: int = 64, into: int = 96, bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    """A quantized layer, and a dense one with the weight it decodes to."""
    layer = quantize_module(nn.Linear(into, out, bias=bias), method)
    same = nn.Linear(into, out, bias=bias)
    with torch.no_grad():
        same.weight.copy_(layer.weight)
        if bias:
            same.bias.copy_(layer.bias)
    return layer, same


@every
@pytest.mark.parametrize("bias", [True, False])
def test_product_and_gradients_equal_the_dense_layer(method: Format, bias: bool) -> None:
    layer, same = linear(method, bias=bias)
    x, target = torch.randn(3, 5, 96, requires_grad=True), torch.randn(3, 5, 64)
    y, expected = layer(x), same(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)
    wanted = [x, layer.bias] if bias else [x]
    found = torch.autograd.grad((y * target).sum(), wanted)
    reference = torch.autograd.grad((expected * target).sum(), [x, same.bias] if bias else [x])
    for one, other in zip(found, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert isinstance(layer, nn.Linear)
    assert "weight" not in layer.state_dict()
    assert layer.weight.shape == (64, 96)
    assert not layer.weight.requires_grad


@every
def test_nothing_dense_and_not_the_input_is_kept_for_backward(method: Format) -> None:
    layer, _ = linear(method)
    x = torch.randn(7, 96, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x).sum().backward()
    assert len(saved) == len(layer.code.tensors())
    for tensor, own in zip(saved, layer.code.tensors().values(), strict=True):
        assert tensor.data_ptr() == own.data_ptr(), "only references to the codes"
    if not isinstance(method, Dense):
        assert sum(tensor.nbytes for tensor in saved) < 0.3 * 64 * 96 * 4
    assert x.grad is not None


def test_compiled_it_keeps_nothing_dense_either() -> None:
    layer, same = linear(NF4(double=True), 128, 64)
    run = torch.compile(lambda x: layer(x).relu(), fullgraph=True, backend="aot_eager")
    x = torch.randn(7, 64, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = run(x)
    torch.testing.assert_close(y, same(x).relu())
    assert all(tensor.shape != (128, 64) and tensor.shape != (64, 128) for tensor in saved)
    assert sum(tensor.nbytes for tensor in saved) < 4 * 128 * 64 / 3
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(same(x).relu().sum(), x)[0])


@pytest.mark.slow
@pytest.mark.parametrize("method", [NF4(), Absmax(), Affine(3)], ids=str)
def test_compiles_as_one_graph_of_machine_code(method: Format) -> None:
    torch._dynamo.reset()
    layer, same = linear(method)
    run = torch.compile(layer, fullgraph=True)
    x = torch.randn(7, 96, requires_grad=True)
    torch.testing.assert_close(run(x), same(x))
    torch.testing.assert_close(torch.autograd.grad(run(x).sum(), x), torch.autograd.grad(same(x).sum(), x))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(lambda: layer.weight * 2, fullgraph=True)(), same.weight * 2)


@pytest.mark.parametrize("operator", ["product", "decode"])
def test_the_operators_are_well_formed(operator: str) -> None:
    layer, _ = linear(NF4(), 8, 16)
    tensors, key = list(layer.code.tensors().values()), layer.code.key
    x = torch.randn(3, 16, requires_grad=True)
    arguments = (x, tensors, key, False) if operator == "product" else (tensors, key)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.trimtab, operator).default, arguments, test_utils=checks)


@every
def test_vmap_grad_and_higher_derivatives(method: Format) -> None:
    layer, same = linear(method, 8, 32)
    x = torch.randn(5, 3, 32)
    torch.testing.assert_close(torch.func.vmap(layer)(x), same(x))
    torch.testing.assert_close(torch.func.vmap(layer, in_dims=1, out_dims=1)(x), same(x))
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(layer)(x), same(x))

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        return module(x).square().sum()

    found = torch.func.vmap(torch.func.grad(partial(loss, layer)))(x)
    torch.testing.assert_close(found, torch.func.vmap(torch.func.grad(partial(loss, same)))(x))
    one = torch.randn(1, 32)
    hessians = [torch.autograd.functional.hessian(partial(loss, module), one) for module in (layer, same)]
    torch.testing.assert_close(*hessians)


@pytest.mark.parametrize("shape", [(96,), (1, 96), (2, 0, 96), (2, 3, 4, 96)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    layer, same = linear(NF4())
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x), same(x))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), same(x))
    turned = torch.randn(96, 5).mT
    torch.testing.assert_close(layer(turned), same(turned))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    layer = quantize_module(nn.Linear(96, 64, dtype=dtype), NF4())
    assert layer.weight.dtype == layer.code.dtype == dtype
    x = torch.randn(5, 96, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert y.dtype == dtype
    exact = F.linear(x.float(), layer.weight.float(), layer.bias.float())
    torch.testing.assert_close(y.float(), exact, rtol=2e-2, atol=1e-2)
    (gradient,) = torch.autograd.grad(y.float().sum(), x)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.float(), layer.weight.float().sum(0).expand(5, 96), rtol=2e-2, atol=1e-2)


def test_autocast_multiplies_in_its_own_type() -> None:
    layer, same = linear(NF4())
    x = torch.randn(5, 96, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x), same(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=1e-2)
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_casting_a_model_leaves_scales_alone() -> None:
    layer = quantize_module(nn.Linear(96, 64), NF4(double=True))
    before = {key: value.clone() for key, value in layer.code.tensors().items()}
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert all(torch.equal(before[key], value) for key, value in layer.code.tensors().items())
    assert layer(torch.randn(2, 96, dtype=torch.bfloat16)).dtype == torch.bfloat16
    layer.float()
    assert layer.weight.dtype == torch.float32
    assert layer.to("meta").code.codes.is_meta
    assert layer.weight.shape == (64, 96)


@pytest.mark.parametrize("method", [NF4(), Absmax(), Absmax(64), Dynamic8(), Affine(), Affine(3)], ids=str)
def test_scales_that_ask_for_a_gradient_get_one(method: Format) -> None:
    layer, same = linear(method)
    name = "scale" if isinstance(method, Affine) else "absmax"
    scale = layer.code.get_parameter(name)
    scale.requires_grad_()
    x = torch.randn(4, 96)
    layer(x).sum().backward()
    assert scale.grad is not None
    same(x).sum().backward()
    moved = {name: scale.detach() * 1.01}
    slope = ((layer.code.dense(moved) - layer.code.dense()) * same.weight.grad).sum()
    assert float((scale.grad * scale.detach() * 0.01).sum().detach()) == pytest.approx(
        float(slope.detach()), rel=1e-2, abs=1e-3
    )


@every
def test_pickle_and_deepcopy(method: Format) -> None:
    layer, _ = linear(method)
    x = torch.randn(2, 96)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        assert twin.code.format == method
        assert torch.equal(twin(x), layer(x))
        assert torch.equal(dequantize_module(twin)(x), layer(x))


def test_pickle_in_a_fresh_process(tmp_path: Any, source_environment: dict[str, str]) -> None:
    layer, _ = linear(NF4(double=True))
    (tmp_path / "layer").write_bytes(pickle.dumps(layer))
    program = (
        "import pickle, sys; layer = pickle.load(open(sys.argv[1], 'rb')); import torch; "
        "print(float(layer(torch.ones(1, 96)).sum()), isinstance(layer, torch.nn.Linear))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "layer"], capture_output=True, text=True, env=source_environment
    )
    value, is_linear = done.stdout.split()
    expected = float(layer(torch.ones(1, 96)).sum().detach())
    assert float(value) == pytest.approx(expected, abs=1e-4), done.stderr
    assert is_linear == "True"


@every
def test_conv1d(method: Format) -> None:
    layer = Conv1D(64, 96)
    W = layer.weight.detach().clone()
    quantize_module(layer, method)
    assert layer.weight.shape == (96, 64)
    assert layer.code.shape == (64, 96)
    assert torch.equal(layer.code.dense(), Code.of(W.mT, method).dense()), "encoded as (out, in)"
    x = torch.randn(2, 5, 96, requires_grad=True)
    expected = x @ layer.weight + layer.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(
        torch.autograd.grad(layer(x).sum(), x)[0], layer.weight.sum(1).expand(2, 5, 96), atol=1e-5, rtol=0
    )
    stored = layer.weight.clone()
    dequantize_module(layer)
    assert type(layer) is Conv1D
    assert layer.weight.is_contiguous()
    assert torch.equal(layer.weight, stored)


def test_in_and_out_of_a_model() -> None:
    model, ids = Model(), torch.randint(0, 50, (2, 7))
    before, keys = model(ids), list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    assert quantize(model, NF4(), select=linears) is model
    paths = [path for path, _ in quantized_modules(model)]
    assert paths == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"], "not the head"
    assert {"blocks.0.up.code.codes", "blocks.0.up.code.absmax", "blocks.0.up.bias"} <= set(model.state_dict())
    assert model.head.weight.requires_grad, "what is not selected is left alone"
    coarse = model(ids)
    assert 0 < float((coarse - before).norm() / before.norm()) < 0.2
    coarse.sum().backward()
    dequantize(model)
    torch.testing.assert_close(model(ids), coarse)
    assert sorted(model.state_dict()) == sorted(keys)
    assert [type(module) for module in model.modules()] == classes
    assert not model.blocks[0].up.weight.requires_grad


def test_saved_and_rebuilt() -> None:
    model, ids = Model(), torch.randint(0, 50, (2, 7))
    quantize(model, NF4(double=True), select=only("blocks.0.up", "blocks.1.down"))
    quantize(model, Affine(3, 16), select=only("blocks.0.down"))
    description = describe(model)
    assert description["blocks.0.down"] == {
        "format": {"storage": "affine", "code_bits": 3, "group_size": 16},
        "shape": [32, 64],
        "dtype": "float32",
    }
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh = rebuild(Model(), description)
    assert not fresh.load_state_dict(state).missing_keys
    assert torch.equal(fresh(ids), model(ids))
    with torch.device("meta"):
        hollow = Model()
    rebuild(hollow, description).load_state_dict(state, assign=True)
    assert torch.equal(hollow(ids), model(ids))
    with pytest.raises(UserError, match=r"blocks\.9\.up does not exist.*not a linear layer|blocks\.9"):
        rebuild(Model(), {"blocks.9.up": description["blocks.0.up"], "embed": description["blocks.0.up"]})
    with pytest.raises(UserError, match=r"head has shape \[50, 32\], the file \[64, 32\]"):
        rebuild(Model(), {"head": description["blocks.0.up"]})


def test_a_module_is_taken_whole_and_once() -> None:
    model = Model()
    places = [At("blocks.0.up", part) for part in ("q", "k", "v")]
    quantize(model, NF4(), "q, k, v", select=lambda model, where: places)
    assert [path for path, _ in quantized_modules(model)] == ["blocks.0.up"]


def test_the_head_on_demand() -> None:
    model = quantize(Model(), Absmax(), "head", select=only("head"))
    assert [path for path, _ in quantized_modules(model)] == ["head"]


def test_everything_wrong_is_told_at_once_and_nothing_is_changed() -> None:
    model = Model()
    model.head.weight = model.embed.weight
    with torch.no_grad():
        model.blocks[0].down.weight[3, 3] = float("nan")
    quantize(model, NF4(), select=only("blocks.1.up"))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    bad = only("blocks.0.up", "blocks.0.down", "blocks.1.up", "head", "embed", "blocks.0.norm")
    with pytest.raises(UserError) as error:
        quantize(model, NF4(), "some", select=bad)
    for said in (
        "blocks.0.down: 1 of 2048 entries are infinite or NaN",
        "blocks.1.up: is quantized already (NF4(block_size=64, scale=None))",
        "head: its weight is tied",
        "embed: a Embedding is not a linear layer",
        "blocks.0.norm: a LayerNorm is not a linear layer",
    ):
        assert said in str(error.value)
    assert "blocks.0.up" not in str(error.value)
    assert list(state) == list(model.state_dict())
    with pytest.raises(UserError, match=r"group_size=48 does not divide in_features=32[^$]*in_features=64"):
        quantize(Model(), Affine(4, 48), "some", select=only("blocks.0.up", "blocks.0.down"))
    with pytest.raises(UserError, match="selects no linear layer"):
        quantize(Model(), NF4(), "nothing", select=only())


@pytest.mark.parametrize("bias", [True, False])
def test_a_class_with_a_forward_of_its_own_that_is_a_linear_layers_is_taken(bias: bool) -> None:
    from transformers.models.falcon.modeling_falcon import FalconLinear

    layer, x = FalconLinear(64, 32, bias=bias), torch.randn(2, 3, 64)
    quantize_module(layer, NF4())
    W: Any = layer.code
    torch.testing.assert_close(layer(x), nn.functional.linear(x, W.dense(), layer.bias))


def test_layers_that_are_not_plain_are_refused() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    with pytest.raises(UserError, match="Own has a forward of its own"):
        quantize_module(Own(4, 4), NF4())
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    with pytest.raises(UserError, match="no plain 2-D weight"):
        quantize_module(parametrized, NF4())
    edited = nn.Linear(4, 4)
    edited.add_module("delta", nn.Identity())
    with pytest.raises(UserError, match="has adapters"):
        quantize_module(edited, NF4())
    with pytest.raises(UserError, match="is not quantized"):
        dequantize_module(nn.Linear(4, 4))


def test_raw_parameters_stay_dense_with_a_warning() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 2), "up": nn.Linear(32, 64)})
    places = [At("attention", parameter="in_proj_weight"), At("up")]
    with pytest.warns(UserWarning, match=r"attention\.in_proj_weight stay dense"):
        quantize(model, NF4(), select=lambda model, where: places)
    assert [path for path, _ in quantized_modules(model)] == ["up"]


def test_a_weight_that_is_read_raw_still_works() -> None:
    attention, x = nn.MultiheadAttention(32, 2), torch.randn(5, 2, 32)
    quantize_module(attention.out_proj, Absmax())
    y, _ = attention(x, x, x)
    dequantize_module(attention.out_proj)
    torch.testing.assert_close(attention(x, x, x)[0], y)


def test_a_forward_patched_on_the_instance_is_respected() -> None:
    layer = nn.Linear(96, 64)
    layer._old_forward = layer.forward
    layer.forward = partial(lambda module, x: module._old_forward(x) + 1, layer)
    x = torch.randn(3, 96, requires_grad=True)
    quantize_module(layer, NF4())
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias) + 1)
    assert all(tensor.numel() < 64 * 96 for tensor in saved)
    dequantize_module(layer)
    torch.testing.assert_close(layer(x), y)


def test_code_can_be_replaced_and_updated() -> None:
    code = Code.of(torch.randn(8, 64), Affine(4, 16))
    moved = code.with_tensors({"zero": code.zero + 1})
    torch.testing.assert_close(moved.dense(), code.dense() - code.scale.repeat_interleave(16, 1))
    torch.testing.assert_close(code.dense({"zero": code.zero + 1}), moved.dense())
    kept = code.zero
    code.update({"zero": moved.zero})
    assert torch.equal(code.dense(), moved.dense())
    assert code.zero is kept
    with pytest.raises(UserError, match="no tensor absmax; it has codes, scale, zero"):
        code.update({"absmax": code.zero})
    assert "6.000 bits" not in repr(code)
    assert "8.000 bits per weight" in repr(code)
    assert all(not parameter.requires_grad for parameter in code.parameters())


def test_dense_is_a_copy() -> None:
    code = Code.of(torch.ones(4, 4), Dense("float32"))
    code.dense().zero_()
    assert torch.equal(code.dense(), torch.ones(4, 4))


def test_a_format_from_outside_works() -> None:
    layer = quantize_module(nn.Linear(8, 4), Sign())
    x = torch.randn(2, 8)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    twin = pickle.loads(pickle.dumps(layer))
    assert torch.equal(twin(x), layer(x))


@dataclass(frozen=True)
class Sign(Format):
    """Signs and one mean magnitude."""

    def encode(self, W: Tensor) -> dict[str, Tensor]:
        return {"codes": W > 0, "mean": W.float().abs().mean()}

    def decode(self, code: Any, shape: tuple[int, ...]) -> Tensor:
        return torch.where(code["codes"], code["mean"], -code["mean"]).view(shape)

    def bits(self, shape: tuple[int, ...]) -> float:
        return 8.0


def test_gradient_checkpointing_gives_the_same_gradient() -> None:
    model, x = Model().requires_grad_(False), torch.randn(2, 7, 32, requires_grad=True)
    quantize(model, NF4(double=True), select=linears)
    (expected,) = torch.autograd.grad(model.blocks(x).square().sum(), x)
    y = torch.utils.checkpoint.checkpoint(model.blocks, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], expected)


def test_fake_tensors_pass_without_data() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer, _ = linear(NF4(double=True))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(torch.randn(3, 96))).shape == (3, 64)
