"""LLM.int8(): int8 weights times int8 inputs, but for the few inputs that are large, which keep full precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.format import Format
from trimtab.core.product import shaped
from trimtab.storage.absmax import Absmax

CHUNK = 1024
"""Inputs whose int8 products a float32 sum still holds exactly: 1024 · 127² < 2²⁴."""


@dataclass(frozen=True)
class LLMInt8(Format):
    """y = Σ_{j∉O} x_j W_jᵀ in int8 + Σ_{j∈O} x_j Ŵ_jᵀ in full precision, O = {j : |x_j| ≥ `threshold` for some token}.

    The int8 part is a ∘ (X₈ W₈ᵀ) ∘ s / 127², summed in int32: X₈ = round(127 x / a) with a the largest |x| of a token
    outside O, and W₈ with s = max |W| of an output, as `Absmax` stores them; Ŵ = s W₈ / 127. `threshold` 0 takes every
    column apart, infinity none. The gradient for x is that of x Ŵᵀ: rounding x is passed straight through.

    What is computed depends on the input, and through O on the other tokens of a call, so a merged adapter is not
    exactly what it was beside these codes: Ŵ takes the whole of x. Sums of int8 are exact, on a device without a
    product of int8 by way of float32.
    Tensors and bits per weight: those of `Absmax`, 8 + 32 / in. Error: of Ŵ absmax / 254; of x, a / 254 a token.
    Reference: arXiv 2208.07339, which takes a over the columns outside O, as here; bitsandbytes zeroes single large
    entries before it, and on a CPU multiplies x with Ŵ.
    """

    threshold: float = 6.0

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise UserError(f"LLMInt8: threshold={self.threshold!r}", fix="6.0, or another number of at least 0")

    def encode(self, W: Tensor) -> dict[str, Tensor]:
        return Absmax().encode(W)

    def decode(self, code: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        return Absmax().decode(code, shape)

    def multiply(self, x: Tensor, code: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        X = x.reshape(-1, shape[1])  # (tokens, in)
        W8, s = code["codes"], code["absmax"].float()  # (out, in), (out)
        large = (X.abs() >= self.threshold).any(0)
        outside = X.masked_fill(large, 0.0).float()
        a = outside.abs().amax(1, keepdim=True)  # (tokens, 1)
        X8 = (outside * (127.0 / torch.where(a > 0, a, 1.0))).round_().to(torch.int8)
        y = integer_product(X8, W8).float() * (a / 127) * (s / 127)
        if bool(large.any()):
            O = large.nonzero()[:, 0]  # noqa: E741
            y += F.linear(X[:, O].float(), W8[:, O].float() * (s / 127)[:, None])
        return shaped(y.to(x.dtype), (*x.shape[:-1], shape[0]))

    def bits(self, shape: tuple[int, ...]) -> float:
        return Absmax().bits(shape)


def integer_product(X: Tensor, W: Tensor) -> Tensor:
    """X Wᵀ of int8 matrices (tokens, in) and (out, in), exactly; int32, or float64 with the same values."""
    if X.device.type == "cpu" and exact_on_cpu():
        return torch._int_mm(X, W.mT)
    if X.device.type == "cuda" and X.shape[0] > 16 and not (X.shape[1] % 8 or W.shape[0] % 8):
        return torch._int_mm(X, W.mT)
    parts = (part.float() @ other.float().mT for part, other in zip(X.split(CHUNK, 1), W.split(CHUNK, 1), strict=True))
    kind = torch.float32 if X.device.type == "mps" else torch.float64
    total = next(parts).to(kind)
    for part in parts:
        total += part
    return total


@cache
def exact_on_cpu() -> bool:
    """Whether this CPU sums products of int8 in int32: some instructions cut sums of two off at 2¹⁵."""
    X, W = torch.full((32, 256), 127, dtype=torch.int8), torch.full((32, 256), -127, dtype=torch.int8)
    try:
        return bool((torch._int_mm(X, W.mT) == -256 * 127**2).all())
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
