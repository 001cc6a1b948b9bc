"""What a checkpoint has to tell so that a model can be built around its codes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from trimtab.core.format import Format


@dataclass(frozen=True)
class Coded:
    """One linear weight (out, in) as codes in a format of ours."""

    format: Format
    tensors: Mapping[str, Tensor]
    shape: tuple[int, int]


Get = Callable[[str], Tensor | None]
"""The tensor of one layer by the end of its name (`weight.absmax`), None where the file has none."""


class Layout(ABC):
    """How one tool keeps the weight of a linear layer in a safetensors file."""

    name: str
    """What it is called in notes and errors."""
    marks: tuple[str, ...]
    """Ends of names that only tensors of coded layers have; `weight`, which other layers have too, may come besides."""

    @abstractmethod
    def format(self, get: Get) -> tuple[Format, tuple[int, int]]:
        """Format and shape (out, in) of a layer, from its small tensors alone."""

    @abstractmethod
    def read(self, get: Get) -> Coded:
        """The codes of a layer. A `UserError` says what is missing, damaged or not to be held."""


class Source(ABC):
    """A checkpoint: dense tensors by parameter name, codes by the path of their layer."""

    kind: str
    """What it is, in words."""

    @abstractmethod
    def names(self) -> frozenset[str]:
        """Names of the dense tensors."""

    @abstractmethod
    def dense(self, name: str) -> Tensor:
        """A dense tensor by its name."""

    @abstractmethod
    def paths(self) -> frozenset[str]:
        """Layers that are kept in codes."""

    @abstractmethod
    def format(self, path: str) -> tuple[Format, tuple[int, int]]:
        """Format and shape of a coded layer."""

    @abstractmethod
    def read(self, path: str) -> Coded:
        """The codes of a layer."""

    def notes(self) -> list[str]:
        """What a user should know about how it was read."""
        return []
