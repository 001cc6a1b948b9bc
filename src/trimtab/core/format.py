"""Storage axis: how frozen weights are kept. A format is a pair of pure functions, `encode` and `decode`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Format(ABC):
    """Abstract base of storage formats; the fields of a subclass are its settings, hence also its JSON and its flags.

    `encode(W)` turns a floating `(out, in)` matrix into a dict of tensors, `decode(code, shape)` turns them back into
    fp32. A double quantization is a format applied to another format's scales. A format that `needs_inputs` chooses its
    codes by what a layer sees: `encode_for(W, H)`, called by `calibrate`.
    """

    @property
    def needs_inputs(self) -> bool:
        """Whether `encode_for` chooses codes by what a layer sees."""
        return False

    @abstractmethod
    def encode(self, W: Tensor) -> dict[str, Tensor]:
        """Codes and scales of `W` (out, in). Infinite or NaN entries are refused with an error."""

    def encode_for(self, W: Tensor, H: Tensor) -> dict[str, Tensor]:
        """Codes and scales of `W` (out, in) for inputs with second moment `H` (in, in), known up to a factor."""
        return self.encode(W)

    @abstractmethod
    def decode(self, code: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """The fp32 matrix of `shape` that the codes stand for."""

    def multiply(self, x: Tensor, code: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor | None:
        """x Wᵀ for x (..., in) by another way than decoding W, which its gradient still goes through; else None."""
        return None

    @abstractmethod
    def bits(self, shape: tuple[int, ...]) -> float:
        """Stored bits per weight for a matrix of `shape`, scales and offsets included."""

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Stored bytes for a matrix of `shape`, by the formula."""
        return round(self.bits(shape) * math.prod(shape) / 8)
