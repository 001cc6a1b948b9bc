"""The field's standard arithmetic, each rule as a function, so that the documentation's numbers are checked."""

from __future__ import annotations

import math
from collections.abc import Sequence

MIXED_ADAM = {"weight": 2, "gradient": 2, "master": 4, "first moment": 4, "second moment": 4}
"""Bytes per parameter of full fine-tuning in mixed precision: 16."""


def full_bytes(parameters: float) -> float:
    """Bytes of full fine-tuning with Adam in mixed precision, before activations: 16 a parameter."""
    return sum(MIXED_ADAM.values()) * parameters


def lora_bytes(parameters: float, adapter: float, weight: int) -> float:
    """Bytes of LoRA before activations: `weight` a frozen parameter (4 in fp32, 2 in bf16), 16 a trained one."""
    return weight * parameters + sum(MIXED_ADAM.values()) * adapter


def lora_values(layers: int, rank: int, shapes: Sequence[tuple[int, int]]) -> int:
    """Trained values of LoRA at linears of these (out, in) shapes in each layer: Σ rank·(out + in)."""
    return layers * rank * sum(out + into for out, into in shapes)


def square_values(parameters: float, rank: int) -> float:
    """Trained values of LoRA where a model is seen as one square matrix of side √N: 2·√N·rank."""
    return 2 * math.sqrt(parameters) * rank


def llama_linears(width: int, middle: int) -> list[tuple[int, int]]:
    """(out, in) of the seven linears of a Llama layer with as many key heads as query heads."""
    return [(width, width)] * 4 + [(middle, width)] * 2 + [(width, middle)]


def scale_bits(block: int = 64, nested: int | None = None, scale: int = 32, coded: int = 8) -> float:
    """Bits per weight that block scales cost: 32/64; coded in 8 bits with a scale per `nested` of them, 0.127."""
    return scale / block if nested is None else coded / block + scale / (block * nested)


def step_flops(parameters: float, trained: float | None = None) -> float:
    """Operations per token of a step, N counting the weights of matrix products: 6N where all of them train.

    An adapter of P values beside frozen weights: forward 2N + 2P, gradient of the inputs 2N + 2P, of its own 2P.
    """
    return 6 * parameters if trained is None else 4 * parameters + 6 * trained
