"""What every storage format owes: bounds, exact sizes, stability, refusal of damage, a name that survives JSON."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trimtab.core.bits import pack, packed_bytes
from trimtab.core.errors import UserError
from trimtab.core.format import Format
from trimtab.core.registry import find, from_json, names, to_json
from trimtab.storage import _blocks
from trimtab.storage.absmax import Absmax
from trimtab.storage.affine import Affine
from trimtab.storage.dense import Dense
from trimtab.storage.dynamic8 import Dynamic8
from trimtab.storage.fp4 import FP4
from trimtab.storage.nf4 import LEVELS, MIDPOINTS, NF4, nearest
from trimtab.storage.pruned import Pruned

FORMATS: list[Format] = [
    Dense(),
    Dense("float32"),
    Dense("float16"),
    Absmax(),
    Absmax(64),
    Dynamic8(),
    Dynamic8(center=True),
    Dynamic8(grid=65536),
    NF4(),
    NF4(block_size=7),
    NF4(double=True),
    FP4(),
    FP4(7),
    FP4(double=True),
    NF4(scale=Absmax(256)),
    NF4(scale=Dynamic8(256, center=True)),
    Affine(),
    Affine(8),
    Affine(3, 16),
    Affine(2, 4),
    Affine(4, 1),
    Pruned(dtype="float32"),
    Pruned(0.9, "float32"),
]
SHAPES = [(64, 96), (3, 32), (1, 64), (7, 160), (33, 32)]
every = pytest.mark.parametrize("method", FORMATS, ids=str)


def normal(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def bound(method: Format, W: Tensor) -> Tensor:
    """The largest error a format may make at each entry, from its documentation."""
    flat = W.flatten()

    def per_block(size: int) -> Tensor:
        blocks = torch.nn.functional.pad(flat.abs(), (0, -flat.numel() % size)).view(-1, size)
        return blocks.amax(1).repeat_interleave(size)[: flat.numel()].view(W.shape)

    match method:
        case Dense():
            return W.abs() * torch.finfo(getattr(torch, method.dtype)).eps / 2 + 1e-7
        case Absmax():
            return per_block(method.block_size or W.shape[-1]) * (1 / 254 + 1e-6)
        case Dynamic8():
            offset = W.mean() if method.center else 0.0
            return per_block(method.block_size) * 0.00706 + abs(offset) * 0.00706 + 1e-9
        case NF4():
            absmax = per_block(method.block_size)
            return absmax * 0.1521 + (0 if method.scale is None else absmax.max() * 0.0075)
        case FP4():
            absmax = per_block(method.block_size)
            return absmax * 0.16667 + (0 if method.scale is None else absmax.max() * 0.0075)
        case Pruned():
            gone = flat.abs().sort().values[: int(method.sparsity * flat.numel())]
            return torch.where(W.abs() <= gone[-1:].sum(), W.abs(), 0.0)
        case Affine():
            groups = W.view(W.shape[0], -1, method.group_size)
            scale = (groups.amax(-1) - groups.amin(-1)) / (2**method.code_bits - 1)
            return scale.repeat_interleave(method.group_size, 1) * (0.5 + 1e-4) + 1e-6 * W.abs().max()
    raise AssertionError(method)


@every
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_bounded(method: Format, shape: tuple[int, int], dtype: torch.dtype) -> None:
    W = normal(shape).to(dtype)
    before = W.clone()
    code = method.encode(W)
    decoded = method.decode(code, shape)
    assert decoded.shape == shape
    assert decoded.dtype == torch.float32
    assert ((decoded - W.float()).abs() <= bound(method, W.float())).all()
    assert torch.equal(W, before)
    assert torch.equal(decoded, method.decode(code, shape)), "decoding may not change the codes"


@every
@pytest.mark.parametrize("shape", [*SHAPES, (1, 16), (5, 48)])
def test_bits_are_the_stored_bytes(method: Format, shape: tuple[int, int]) -> None:
    if isinstance(method, Affine) and shape[1] % method.group_size:
        shape = (shape[0], 2 * shape[1])
    stored = sum(tensor.nbytes for tensor in method.encode(normal(shape)).values())
    assert method.bits(shape) * math.prod(shape) / 8 == pytest.approx(stored, abs=1e-6)
    assert method.bytes(shape) == stored


@pytest.mark.parametrize(
    ("method", "bits"),
    [
        (NF4(), 4.5),
        (FP4(), 4.5),
        (NF4(double=True), 4 + 8 / 64 + 32 / (64 * 256) + 32 / 4096**2),
        (Absmax(), 8 + 32 / 4096),
        (Absmax(256), 8.125),
        (Dynamic8(), 8.125),
        (Affine(), 6.0),
        (Affine(3, 128), 3.5),
        (Affine(2, 64), 3.0),
        (Dense(), 16.0),
    ],
    ids=str,
)
def test_bits_of_a_large_matrix(method: Format, bits: float) -> None:
    assert method.bits((4096, 4096)) == pytest.approx(bits, abs=1e-9)


@every
def test_layout_is_known_without_data(method: Format) -> None:
    meta = method.encode(torch.empty(12, 64, device="meta"))
    real = method.encode(normal((12, 64)))
    assert {key: (value.shape, value.dtype) for key, value in meta.items()} == {
        key: (value.shape, value.dtype) for key, value in real.items()
    }
    assert method.decode(meta, (12, 64)).shape == (12, 64)


# Not where the mean is subtracted: that of the decoded tensor is another one, which moves every value.
@pytest.mark.parametrize("method", [one for one in FORMATS if one != Dynamic8(center=True)], ids=str)
def test_encoding_what_was_decoded_gives_the_same_codes(method: Format) -> None:
    W = normal((64, 96))
    code = method.encode(W)
    again = method.encode(method.decode(code, (64, 96)))
    match method:
        case Dynamic8():
            same = torch.isclose(code["absmax"], again["absmax"], rtol=1e-6, atol=0)
            negative = torch.stack([block[block.abs().argmax()] < 0 for block in W.flatten().split(256)])
            assert torch.equal(same, ~negative), "a negative extreme is clipped, and only that"
            whole = same.repeat_interleave(256).view(64, 96)
            assert torch.equal(code["codes"][whole], again["codes"][whole])
        case FP4():  # of its two zeros the other may be taken
            assert torch.equal(method.decode({**code, "codes": again["codes"]}, W.shape), method.decode(code, W.shape))
        case _:
            assert torch.equal(
                code["codes" if "codes" in code else "values"], again["codes" if "codes" in code else "values"]
            )
    nested = isinstance(method, NF4 | FP4) and method.scale is not None
    if not nested and not isinstance(method, Dynamic8):
        for key, value in code.items():
            if isinstance(method, FP4) and key == "codes":
                continue
            tolerance = 0.0 if isinstance(method, NF4 | FP4 | Dense | Pruned) else 1e-5
            torch.testing.assert_close(again[key], value, rtol=tolerance, atol=tolerance)


@every
@pytest.mark.parametrize("shape", [(4, 32), (1, 1), (3, 5), (1, 63)])
def test_zeros_stay_zeros(method: Format, shape: tuple[int, int]) -> None:
    if isinstance(method, Affine) and shape[1] % method.group_size:
        shape = (shape[0], method.group_size)
    code = method.encode(torch.zeros(shape))
    assert all(torch.isfinite(tensor.float()).all() for tensor in code.values())
    assert not method.decode(code, shape).any()


@every
def test_a_zero_row_beside_others(method: Format) -> None:
    W = normal((4, 256))
    W[2] = 0
    found = method.decode(method.encode(W), (4, 256))[2].abs().max()
    loose = isinstance(method, Dynamic8) and (method.center or method.grid)
    assert found <= (W.abs().max() * 0.007 if loose else 0)


@every
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 7), (13, 11)])
def test_odd_sizes(method: Format, shape: tuple[int, int]) -> None:
    if isinstance(method, Affine):
        method = Affine(method.code_bits, 1)
    W = normal(shape)
    code = method.encode(W)
    assert sum(tensor.nbytes for tensor in code.values()) == method.bytes(shape)
    assert ((method.decode(code, shape) - W).abs() <= bound(method, W)).all()


@every
@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-30, 1e30, 1e38])
def test_extreme_magnitudes(method: Format, scale: float) -> None:
    if isinstance(method, Dense) and method.dtype == "float16" and scale > 1:
        with pytest.raises(UserError, match="overflow float16"):
            method.encode(torch.full((2, 32), scale))
        return
    W = torch.linspace(-1, 1, 64).view(2, 32) * scale
    decoded = method.decode(method.encode(W), (2, 32))
    slack = 1e-37 if isinstance(method, NF4 | FP4 | Dynamic8 | Affine) else 1e-7 if isinstance(method, Dense) else 1e-43
    allowed = bound(method, W / scale).double() * scale if scale > 1 else bound(method, W).double()
    assert ((decoded.double() - W.double()).abs() <= allowed * (1 + 1e-5) + slack).all()


@every
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_refused(method: Format, value: float) -> None:
    W = normal((4, 32))
    W[1, 3] = W[2, 2] = value
    with pytest.raises(UserError, match="2 of 128 entries are infinite, NaN") as error:
        method.encode(W)
    assert type(method).__name__ in str(error.value)


@every
def test_what_is_no_floating_matrix_is_refused(method: Format) -> None:
    with pytest.raises(UserError, match="int64"):
        method.encode(torch.ones(4, 32, dtype=torch.int64))
    with pytest.raises(UserError):
        method.encode(torch.ones(4, 0))


def test_finite_entries_whose_sum_overflows_are_accepted() -> None:
    W = torch.full((4, 32), 3e38)
    assert torch.isfinite(Absmax().decode(Absmax().encode(W), (4, 32))).all()


@every
def test_several_pieces_are_one(method: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    W = normal((64, 97 if not isinstance(method, Affine) else 96))
    whole = method.encode(W)
    decoded = method.decode(whole, tuple(W.shape))
    monkeypatch.setattr(_blocks, "PIECE", 256)
    parts = method.encode(W)
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert torch.equal(method.decode(parts, tuple(W.shape)), decoded)


@every
def test_values_survive_json_hash_and_copy(method: Format) -> None:
    text = json.dumps(to_json(method))
    back = from_json(json.loads(text))
    assert back == method
    assert hash(back) == hash(method)
    assert type(back) is type(method)
    assert eval(repr(method)) == method


def test_names_and_nesting_in_json() -> None:
    assert {"absmax", "affine", "dense", "dynamic8", "nf4"} <= set(names("storage"))
    assert find("nf4", "storage") is NF4
    assert to_json(NF4(scale=Absmax(256))) == {
        "storage": "nf4",
        "block_size": 64,
        "scale": {"storage": "absmax", "block_size": 256},
    }


def test_double_is_short_for_a_scale() -> None:
    assert NF4(double=True) == NF4(scale=Dynamic8(256, center=True, grid=65536))
    assert NF4(double=True) == NF4(scale=Dynamic8(256, center=True, grid=65536), double=True)
    assert NF4(double=True) != NF4()
    with pytest.raises(UserError, match="contradict"):
        NF4(scale=Absmax(256), double=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NF4(block_size=0), "block_size=0"),
        (lambda: NF4(block_size=True), "block_size=True"),
        (lambda: NF4(scale="dynamic8"), "not a storage format"),
        (lambda: Absmax(-1), "block_size=-1"),
        (lambda: Dynamic8(1.5), "block_size=1.5"),
        (lambda: Dynamic8(signed=False, center=True), "both signs"),
        (lambda: Dynamic8(signed=False).encode(torch.tensor([[-1.0]])), "least entry is -1"),
        (lambda: Affine(5), "code_bits=5"),
        (lambda: Affine(4, 0), "group_size=0"),
        (
            lambda: Affine(4, 32).encode(torch.ones(2, 100)),
            r"group_size=32 does not divide in_features=100\n.*100, 50, 25",
        ),
        (lambda: Dense("int8"), "dtype='int8'"),
        (lambda: from_json({"storage": "nf5"}), "nf4"),
        (lambda: from_json({"storage": "nf4", "blocksize": 64}), "block_size"),
    ],
)
def test_wrong_settings_are_explained(make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_looking_up_cells_equals_counting_midpoints() -> None:
    edges = torch.cat([MIDPOINTS, LEVELS, torch.linspace(-1, 1, 65)])
    near = [edges, torch.nextafter(edges, torch.tensor(2.0)), torch.nextafter(edges, torch.tensor(-2.0))]
    x = torch.cat([*near, torch.empty(20000).uniform_(-1, 1)]).clamp(-1, 1)
    assert torch.equal(nearest(x).int(), torch.bucketize(x, MIDPOINTS, out_int32=True))
    assert torch.equal(nearest(x).int(), (x[:, None] > MIDPOINTS).sum(1).int())


def test_grid_loses_only_what_is_tiny() -> None:
    W = torch.tensor([[1.0, 0.5, 0.01, 1e-6, 0.0, -1e-6]])
    exact, coarse = Dynamic8(), Dynamic8(grid=65536)
    assert exact.decode(exact.encode(W), (1, 6))[0, 4] == 0
    found = coarse.decode(coarse.encode(W), (1, 6))
    assert (found[0, 3:].abs() < 3e-5).all()
    assert (found[0, 4:] != 0).all(), "as in the CPU kernel it reproduces"


@given(st.integers(0, 10**6), st.sampled_from([2, 3, 4, 8]), st.integers(1, 200))
def test_packing_is_exact(seed: int, bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (1, count), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    stream = pack(codes.view(-1), bits)
    assert stream.numel() == packed_bytes(count, bits)
    assert torch.equal(Affine(bits, 1).integers({"codes": stream}, (1, count)), codes.float())


def test_affine_keeps_a_constant_group_exactly() -> None:
    W = torch.cat([torch.full((2, 32), 0.123), torch.full((2, 32), -7.7), normal((2, 32))], 1)
    code = Affine().encode(W)
    assert torch.equal(Affine().decode(code, (2, 96))[:, :64], W[:, :64])
    assert (code["scale"][:, :2] == 1).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_an_update_constant_in_each_group_folds_into_zero_points(bits: int) -> None:
    method, W = Affine(bits, 16), normal((8, 64))
    code, update = method.encode(W), normal((8, 4), seed=1)
    merged = {**code, "zero": code["zero"] - update / code["scale"]}
    expected = method.decode(code, (8, 64)) + update.repeat_interleave(16, 1)
    torch.testing.assert_close(method.decode(merged, (8, 64)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (Affine(4, 16), "scale"),
        (Affine(3, 16), "zero"),
        (Absmax(), "absmax"),
        (Absmax(10), "absmax"),
        (NF4(), "absmax"),
    ],
    ids=str,
)
def test_scales_can_be_trained(method: Format, name: str) -> None:
    W = normal((4, 32))
    code = method.encode(W)
    code[name] = code[name].clone().requires_grad_()
    target = normal((4, 32), seed=1)
    (gradient,) = torch.autograd.grad((method.decode(code, (4, 32)) * target).sum(), code[name])
    step = 1e-2 * code[name].detach().abs().max()
    for index in list(torch.ones_like(gradient).nonzero())[:3]:
        moved = {key: value.detach().clone() for key, value in code.items()}
        moved[name][tuple(index)] += step
        here = (method.decode({k: v.detach() for k, v in code.items()}, (4, 32)) * target).sum()
        slope = ((method.decode(moved, (4, 32)) * target).sum() - here) / step
        assert float(slope) == pytest.approx(float(gradient[tuple(index)]), rel=2e-2, abs=1e-5)


def test_normal_weights_lose_as_much_as_is_known() -> None:
    W = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))

    def loss(method: Format) -> float:
        error = method.decode(method.encode(W), (512, 512)) - W
        return float(error.norm() / W.norm())

    assert loss(NF4()) == pytest.approx(0.0920, abs=5e-4)
    assert loss(NF4(double=True)) == pytest.approx(0.0920, abs=1e-3)
    assert loss(Absmax(64)) < loss(Absmax()) < 0.01
    assert loss(Affine(4, 64)) < 0.10
    assert loss(Affine(2)) > loss(Affine(3)) > loss(Affine(4)) > loss(Affine(8))


def test_nothing_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in FORMATS:
            method.decode(method.encode(normal((7, 64))), (7, 64))
