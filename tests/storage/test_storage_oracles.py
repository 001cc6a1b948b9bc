"""Every format equals its equation, written separately in NumPy float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import oracle_absmax
import oracle_affine
import oracle_dynamic8
import oracle_nf4
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from trimtab.core.format import Format
from trimtab.storage.absmax import Absmax
from trimtab.storage.affine import Affine
from trimtab.storage.dense import Dense
from trimtab.storage.dynamic8 import MAPS, Dynamic8
from trimtab.storage.fp4 import FP4
from trimtab.storage.nf4 import LEVELS, NF4

shapes = st.tuples(st.integers(1, 9), st.integers(1, 150))
sizes = st.sampled_from([1, 2, 7, 32, 64, 100, 4096])
seeds = st.integers(0, 10**6)


def matrix(shape: tuple[int, int], seed: int) -> Tensor:
    """Normal entries of a random magnitude, with a row and a few entries of zeros now and then."""
    draw = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=draw) * 10 ** float(torch.randint(-6, 4, (1,), generator=draw))
    if seed % 3 == 0:
        W[seed % shape[0]] = 0
    return W


def wide(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.double().numpy()


def same_codes(found: Tensor, before_rounding: NDArray[np.float64], round_: Callable[..., NDArray]) -> None:
    """Codes agree, except where fp32 and float64 may fall on different sides of halfway."""
    exact = wide(found)
    low, high = round_(before_rounding * (1 - 1e-5) - 1e-7), round_(before_rounding * (1 + 1e-5) + 1e-7)
    low, high = np.minimum(low, high), np.maximum(low, high)
    assert ((low <= exact) & (exact <= high)).all()
    assert (exact == round_(before_rounding)).mean() > 0.99


def close(found: Tensor, expected: NDArray[np.float64]) -> None:
    np.testing.assert_allclose(wide(found), expected, rtol=3e-6, atol=3e-6 * np.abs(expected).max() + 1e-37)


@given(shapes, st.one_of(st.none(), sizes), seeds)
def test_absmax(shape: tuple[int, int], block_size: int | None, seed: int) -> None:
    W, method = matrix(shape, seed), Absmax(block_size)
    code = method.encode(W)
    scaled, absmax = oracle_absmax.encode(wide(W), block_size)
    same_codes(code["codes"], scaled, np.rint)
    close(code["absmax"], absmax)
    close(method.decode(code, shape), oracle_absmax.decode(wide(code["codes"]), absmax, block_size))
    assert code["codes"].min() >= -127


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_map_follows_from_its_definition(signed: bool) -> None:
    np.testing.assert_allclose(wide(MAPS[signed]), oracle_dynamic8.levels(signed), rtol=1e-6)


@given(shapes, sizes, seeds, st.booleans(), st.booleans())
def test_dynamic8(shape: tuple[int, int], block_size: int, seed: int, signed: bool, center: bool) -> None:
    W = matrix(shape, seed) if signed else matrix(shape, seed).abs()
    method = Dynamic8(block_size, signed, center and signed)
    code = method.encode(W)
    scaled, absmax, offset = oracle_dynamic8.encode(wide(W), block_size, signed, method.center)
    close(code["absmax"], absmax)
    if not method.center:
        table = oracle_dynamic8.levels(signed)
        same_codes(code["codes"], scaled, lambda values: oracle_dynamic8.nearest(values, table))
    else:
        close(code["offset"], np.array([offset]))
    codes = code["codes"].numpy().astype(np.int64)
    close(method.decode(code, shape), oracle_dynamic8.decode(codes, absmax, offset, block_size, wide(MAPS[signed])))


@pytest.mark.parametrize("block_size", [7, 64])
def test_fp4_takes_the_nearest_of_its_levels(block_size: int) -> None:
    """Its levels are floats of one sign bit, two of exponent and one of mantissa, the smallest of them subnormal."""
    W, method = matrix((12, 35), 3), FP4(block_size)
    floats = [0.0, 0.0625, *(2.0**power * mantissa for power in (1, 2, 3) for mantissa in (1.0, 1.5))]
    levels = np.array([sign * one / 12 for one in floats for sign in (-1, 1)])
    flat, found = wide(W).reshape(-1), wide(method.decode(method.encode(W), (12, 35))).reshape(-1)
    for start in range(0, flat.size, block_size):
        block = flat[start : start + block_size]
        absmax = np.abs(block).max()
        wanted = levels[np.abs(block[:, None] / absmax - levels).argmin(1)] * absmax
        np.testing.assert_allclose(found[start : start + block_size], wanted, rtol=1e-6, atol=1e-9)


def test_the_levels_of_nf4_follow_from_normal_quantiles() -> None:
    np.testing.assert_allclose(wide(LEVELS), oracle_nf4.levels(), atol=2e-7)


@given(shapes, sizes, seeds)
def test_nf4(shape: tuple[int, int], block_size: int, seed: int) -> None:
    W, method = matrix(shape, seed), NF4(block_size)
    code = method.encode(W)
    scaled, absmax = oracle_nf4.encode(wide(W), block_size)
    close(code["absmax"], absmax)
    codes = oracle_nf4.unpacked(code["codes"].numpy(), W.numel())
    table = oracle_nf4.levels()
    same_codes(torch.from_numpy(codes), scaled, lambda values: oracle_dynamic8.nearest(values, table))
    close(method.decode(code, shape), oracle_nf4.decode(codes, absmax, block_size, shape))


@given(shapes, st.sampled_from([2, 3, 4, 8]), st.sampled_from([1, 2, 8, 32]), seeds)
def test_affine(shape: tuple[int, int], bits: int, group_size: int, seed: int) -> None:
    shape = (shape[0], -(-shape[1] // group_size) * group_size)
    W, method = matrix(shape, seed), Affine(bits, group_size)
    code = method.encode(W)
    scaled, scale, zero = oracle_affine.encode(wide(W), bits, group_size)
    integers = method.integers(code, shape)
    same_codes(integers, scaled, np.rint)
    close(code["scale"], scale)
    assert code["codes"].numpy().tobytes() == oracle_affine.stream(wide(integers).astype(np.int64), bits)
    expected = oracle_affine.decode(wide(integers), scale, zero, group_size)
    np.testing.assert_allclose(wide(method.decode(code, shape)), expected, atol=1e-5 * np.abs(wide(W)).max() + 1e-37)


@pytest.mark.parametrize("nested", [Absmax(32), Dynamic8(32), Dynamic8(32, center=True)])
def test_double_quantization_is_one_format_on_the_scales_of_another(nested: Format) -> None:
    W = matrix((24, 60), 1)
    plain, twice = NF4(16).encode(W), NF4(16, scale=nested).encode(W)
    scales = nested.encode(plain["absmax"])
    assert torch.equal(plain["codes"], twice.pop("codes"))
    assert {f"absmax_{key}": value.tolist() for key, value in scales.items()} == {
        k: v.tolist() for k, v in twice.items()
    }
    decoded = {"codes": plain["codes"], "absmax": nested.decode(scales, plain["absmax"].shape)}
    found = NF4(16, scale=nested).decode({"codes": plain["codes"], **twice}, (24, 60))
    assert torch.equal(NF4(16).decode(decoded, (24, 60)), found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dense_rounds_and_nothing_else(dtype: str) -> None:
    W = matrix((5, 7), 1)
    assert torch.equal(Dense(dtype).decode(Dense(dtype).encode(W), (5, 7)), W.to(getattr(torch, dtype)).float())
