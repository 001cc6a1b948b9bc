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
    fp32. A double quantization is a format applied to another format's scales.
    """

    @abstractmethod
    def encode(self, W: Tensor) -> dict[str, Tensor]:
        """Codes and scales of `W` (out, in). Infinite or NaN entries are refused with an error."""

    @abstractmethod
    def decode(self, code: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """The fp32 matrix of `shape` that the codes stand for."""

    @abstractmethod
    def bits(self, shape: tuple[int, ...]) -> float:
        """Stored bits per weight for a matrix of `shape`, scales and offsets included."""

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Stored bytes for a matrix of `shape`, by the formula."""
        return round(self.bits(shape) * math.prod(shape) / 8)
