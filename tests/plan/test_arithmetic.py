"""The numbers of docs/planning.md, each from its rule."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.plan.arithmetic import (
    full_bytes,
    llama_linears,
    lora_bytes,
    lora_values,
    scale_bits,
    square_values,
    step_flops,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "planning.md"


def test_sixteen_bytes_a_parameter_make_160_gigabytes_for_ten_billion() -> None:
    assert full_bytes(10e9) == 160e9


def test_lora_on_ten_billion_needs_40_gigabytes_in_fp32_and_21_in_bf16() -> None:
    adapter = lora_values(36, 16, llama_linears(4800, 12800))
    assert lora_bytes(10e9, adapter, 4) == pytest.approx(41e9, rel=0.02)
    assert lora_bytes(10e9, adapter, 2) == pytest.approx(21e9, rel=0.02)


@pytest.mark.parametrize(
    "parameters, rank, published",
    [
        (7e9, 1, 167e3), (13e9, 1, 228e3), (70e9, 1, 529e3), (180e9, 1, 849e3),
        (7e9, 2, 334e3), (13e9, 2, 456e3), (70e9, 2, 1e6), (180e9, 2, 2e6),
        (7e9, 8, 1e6), (13e9, 8, 2e6), (70e9, 8, 4e6), (180e9, 8, 7e6),
        (7e9, 16, 3e6), (13e9, 16, 4e6), (70e9, 16, 8e6), (180e9, 16, 14e6),
        (7e9, 512, 86e6), (13e9, 512, 117e6), (70e9, 512, 270e6), (180e9, 512, 434e6),
        (7e9, 1024, 171e6), (13e9, 1024, 233e6), (70e9, 1024, 542e6), (180e9, 1024, 869e6),
        (7e9, 8192, 1.4e9), (13e9, 8192, 1.8e9), (70e9, 8192, 4.3e9), (180e9, 8192, 7e9),
    ],
)  # fmt: skip
def test_counts_by_rank_of_a_model_seen_as_one_square(parameters: float, rank: int, published: float) -> None:
    digits = str(int(published))
    last = 10 ** (len(digits) - len(digits.rstrip("0")))  # the place of the last digit that is printed
    assert abs(square_values(parameters, rank) - published) < last  # rounded, or cut


def test_counts_of_real_llamas() -> None:
    assert lora_values(32, 16, llama_linears(4096, 11008)) == 39_976_960
    assert lora_values(40, 16, llama_linears(5120, 13824)) == 62_586_880
    assert lora_values(80, 16, llama_linears(8192, 22016)) == 199_884_800


def test_double_quantization_takes_half_a_bit_to_an_eighth() -> None:
    assert scale_bits(64) == 0.5
    assert scale_bits(64, nested=256) == pytest.approx(0.127, abs=5e-4)


def test_operations_of_full_training_and_of_an_adapter() -> None:
    assert step_flops(7e9) == 42e9
    assert step_flops(7e9, 40e6) == 28e9 + 240e6


def test_the_page_shows_these_numbers() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for number in ("160 GB", "41 GB", "21 GB", "39,976,960", "62,586,880", "199,884,800", "0.127", "6N", "4N + 6P"):
        assert number in text, number
