"""Bit for bit what bitsandbytes makes on a CPU (written against 0.50.2), and a golden vector without it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from trimtab.storage.absmax import Absmax
from trimtab.storage.dynamic8 import MAPS, Dynamic8
from trimtab.storage.fp4 import FP4
from trimtab.storage.fp4 import LEVELS as FP4_LEVELS
from trimtab.storage.nf4 import LEVELS, MIDPOINTS, NF4

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
inputs = st.tuples(
    st.integers(1, 3000),
    st.sampled_from(["normal", "heavy", "zeros", "one value", "levels", "halfway"]),
    st.sampled_from(DTYPES),
    st.integers(0, 10**6),
)


def golden() -> Tensor:
    i = torch.arange(16384, dtype=torch.float64)
    return (torch.sin(0.37 * i) * (1 + 0.5 * torch.cos(0.011 * i)) * 0.02).float().view(128, 128)


def test_golden_vector() -> None:
    code = NF4(scale=Dynamic8(256, center=True)).encode(golden())
    assert code["codes"].shape == (8192, 1)
    assert code["codes"][:16, 0].tolist() == [123, 239, 255, 237, 149, 33, 0, 1, 55, 190, 255, 254, 217, 82, 16, 0]
    assert code["absmax_codes"][:8].tolist() == [234, 219, 74, 22, 0, 27, 152, 218]
    assert float(code["absmax_offset"]) == pytest.approx(0.02177305, abs=1e-8)
    assert code["absmax_absmax"].tolist() == pytest.approx([0.01140425], abs=1e-8)
    plain = NF4().encode(golden())
    assert torch.equal(plain["codes"], code["codes"])
    assert plain["absmax"][:4].tolist() == pytest.approx([0.029866787, 0.027430327, 0.020961890, 0.013928352], abs=1e-9)
    error = NF4(double=True).decode(NF4(double=True).encode(golden()), (128, 128)) - golden()
    assert float(error.norm() / golden().norm()) == pytest.approx(0.0935, abs=1e-4)


def test_golden_vector_as_the_cpu_kernel_rounds_it() -> None:
    """Code 6 of the nested scales lies near halfway: the kernel's grid of 65536 steps takes it to the other side."""
    code = NF4(double=True).encode(golden())
    assert code["absmax_codes"][:8].tolist() == [234, 219, 74, 22, 0, 27, 151, 218]


def values(case: tuple[int, str, torch.dtype, int]) -> Tensor:
    """`count` values of a kind, none of them subnormal: there the reciprocal of an absmax is infinite."""
    count, kind, dtype, seed = case
    draw = torch.Generator().manual_seed(seed)
    W = torch.randn(count, generator=draw)
    if kind == "heavy":
        W *= torch.exp(3 * torch.randn(count, generator=draw).clamp(-2, 2))
    elif kind == "zeros":
        W[: count // 2] = 0
    elif kind == "one value":
        W[:] = W[0]
    elif kind in ("levels", "halfway"):
        points = LEVELS if kind == "levels" else torch.cat([MIDPOINTS, torch.ones(1)])
        W = points[torch.randint(0, 16, (count,), generator=draw)]
    return W.to(dtype)


@pytest.fixture(scope="module")
def bnb() -> Iterator[Any]:
    module = pytest.importorskip("bitsandbytes.functional")
    # Its fallback for odd widths compiles itself for every new shape; eagerly it computes the same.
    before = torch._dynamo.config.disable
    torch._dynamo.config.disable = True
    yield module
    torch._dynamo.config.disable = before


def test_the_dynamic_maps_are_the_same(bnb: Any) -> None:
    for signed in (True, False):
        assert torch.equal(MAPS[signed], bnb.create_dynamic_map(signed))
    assert torch.equal(LEVELS, bnb.get_4bit_type("nf4", device="cpu"))
    torch.testing.assert_close(FP4_LEVELS, bnb.get_4bit_type("fp4", device="cpu"), rtol=0, atol=1e-8)


@given(case=inputs, block_size=st.sampled_from([32, 64, 128, 4096]), double=st.booleans())
@example(case=(1, "normal", torch.float32, 0), block_size=64, double=True)
@example(case=(64 * 256 + 1, "normal", torch.float32, 0), block_size=64, double=True)
@example(case=(64 * 300, "heavy", torch.bfloat16, 1), block_size=64, double=True)
@example(case=(640, "halfway", torch.float32, 2), block_size=64, double=False)
@example(case=(65, "zeros", torch.float32, 2), block_size=64, double=False)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits(bnb: Any, kind: str, case: tuple[int, str, torch.dtype, int], block_size: int, double: bool) -> None:
    W = values(case)
    method = NF4(block_size, double=double) if kind == "nf4" else FP4(block_size, double=double)
    code = method.encode(W)
    packed, state = bnb.quantize_4bit(W.clone(), blocksize=block_size, compress_statistics=double, quant_type=kind)
    assert torch.equal(code["codes"], packed)
    if double:
        assert torch.equal(code["absmax_codes"], state.absmax)
        assert torch.equal(code["absmax_absmax"], state.state2.absmax)
        assert torch.equal(code["absmax_offset"], state.offset.view(1))
    else:
        assert torch.equal(code["absmax"], state.absmax)
    assert torch.equal(method.decode(code, W.shape).to(W.dtype), bnb.dequantize_4bit(packed, state).view(W.shape))


@given(case=inputs, block_size=st.sampled_from([64, 256, 4096]), signed=st.booleans())
@example(case=(300, "zeros", torch.float32, 0), block_size=64, signed=True)
def test_dynamic8(bnb: Any, case: tuple[int, str, torch.dtype, int], block_size: int, signed: bool) -> None:
    W = values(case) if signed else values(case).abs()
    method = Dynamic8(block_size, signed, grid=65536)
    code = method.encode(W)
    codes, state = bnb.quantize_blockwise(W.clone(), code=MAPS[signed].clone(), blocksize=block_size)
    assert torch.equal(code["codes"], codes)
    assert torch.equal(code["absmax"], state.absmax)
    assert torch.equal(method.decode(code, W.shape).to(W.dtype), bnb.dequantize_blockwise(codes, state))


@given(case=inputs, rows=st.sampled_from([1, 2, 5]))
@example(case=(300, "zeros", torch.float32, 0), rows=2)
def test_int8(bnb: Any, case: tuple[int, str, torch.dtype, int], rows: int) -> None:
    W = values(case)
    W = W[: max(1, W.numel() // rows) * min(rows, W.numel())].view(min(rows, W.numel()), -1)
    code = Absmax().encode(W)
    codes, absmax, _ = bnb.int8_vectorwise_quant(W.clone())
    assert torch.equal(code["absmax"], absmax)
    used = absmax > 0
    assert torch.equal(code["codes"][used], codes[used])
    assert not code["codes"][~used].any()
    decoded = bnb.int8_vectorwise_dequant(codes, absmax)
    torch.testing.assert_close(Absmax().decode(code, W.shape)[used], decoded[used], rtol=3e-7, atol=0)
