"""LoRA+: the factor that starts at zero learns faster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.transform import State, Transform, named, within

FACTORS = ("B", "lora_B", "lora_embedding_B")
"""What the factor at the output is called, by us and by PEFT."""


@dataclass(frozen=True)
class LoRAPlus(Transform):
    """u = inner(g), with the learning rate times `ratio` for the factors B and for vectors (biases, norms, magnitudes).

    B starts at 0 and A does not, so at a large width one rate for both is too small for B or too large for A. State and
    cost: those of `inner`, whose state bytes it has. The decay of a tensor goes with its own learning rate, as in the
    official code.
    arXiv 2402.12354. The official code also gives embedding factors a rate of 1e-6, which here go like the others. With
    a start that draws B and zeroes A the ratio belongs below 1.
    """

    paper: ClassVar[str] = "2402.12354"
    learning_rate: ClassVar[float] = 0.5
    """A learns at half of LoRA's rate, B at eight times it."""

    inner: str | Transform = "adamw"
    ratio: float = 16.0

    def __post_init__(self) -> None:
        within(self, "ratio", 0, float("inf"))

    @property
    def inners(self) -> tuple[Transform, ...]:
        return (named(self.inner),)

    def rate(self, name: str, p: Tensor) -> float:
        if not name:
            raise UserError("LoRAPlus goes by the names of parameters", fix="Optimizer(model, LoRAPlus()), not tensors")
        return super().rate(name, p) * (self.ratio if self.faster(name, p) else 1.0)

    def faster(self, name: str, p: Tensor) -> bool:
        """Whether a parameter learns at `ratio` times the rate."""
        return p.ndim <= 1 or any(part in FACTORS for part in name.split("."))

    def init(self, p: Tensor) -> State:
        return self.inners[0].init(p)

    def update(self, g: Tensor, s: State, p: Tensor) -> Tensor:
        return self.inners[0].update(g, s, p)

    def state_bytes(self, shape: Sequence[int]) -> int:
        return self.inners[0].state_bytes(shape)
