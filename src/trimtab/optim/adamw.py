"""AdamW: Adam's direction; the decay is the driver's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.core.transform import COUNTER, State, Transform, counter, size, tick, within, zeros


@dataclass(frozen=True)
class AdamW(Transform):
    """u = m̂ / (√v̂ + ε), with m ← β1 m + (1−β1) g, v ← β2 v + (1−β2) g², m̂ = m / (1−β1ᵗ), v̂ = v / (1−β2ᵗ).

    Steps of about the learning rate in every entry, whatever the size of its gradient. State: m and v in fp32, 0 at the
    start: 8 bytes per value, 8 for t. Costs a few passes over the tensor.
    arXiv 1412.6980, decoupled decay 1711.05101. The same as `torch.optim.AdamW`, whose fused kernel `trimtab tune`
    uses for it.
    """

    paper: ClassVar[str] = "1711.05101"

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        within(self, "beta1", 0, 1)
        within(self, "beta2", 0, 1)

    def init(self, p: Tensor) -> State:
        return {"t": counter(), "m": zeros(p), "v": zeros(p)}

    def update(self, g: Tensor, s: State, p: Tensor) -> Tensor:
        t = tick(s)
        m, v = s["m"].lerp_(g, 1 - self.beta1), s["v"].mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
        root = torch.sqrt(v).div_((1 - self.beta2**t) ** 0.5)
        return (m / (1 - self.beta1**t)).div_(root.add_(self.epsilon))

    def state_bytes(self, shape: Sequence[int]) -> int:
        return 8 * size(shape) + COUNTER
