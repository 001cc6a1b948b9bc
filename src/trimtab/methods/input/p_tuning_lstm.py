"""P-tuning as in its paper: a bidirectional LSTM makes the prompt while it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import InputMethod, Method
from trimtab.core.registry import find
from trimtab.core.site import Site

LAYERS = 2
WEIGHTS = [
    f"{kind}_{side}_l{layer}{way}"
    for layer in range(LAYERS)
    for way in ("", "_reverse")
    for kind in ("weight", "bias")
    for side in ("ih", "hh")
]


@dataclass(frozen=True)
class PTuningLSTM(InputMethod):
    """X ← [P; X] with P = relu(BiLSTM(E) W1ᵀ + b1) W2ᵀ + b2 while training.

    E (length, width) ~ N(0, 1) runs through two bidirectional LSTM layers of `hidden` units a direction (None: half the
    width); W1 (2·hidden, 2·hidden), W2 (width, 2·hidden), their biases and the LSTM start as torch's layers. Baked,
    only P (length, width) is left: a prompt of prompt tuning. Adds `length` positions to every row. Not mergeable.
    arXiv 2103.10385. The prompt stands in front, not inside a cloze template.
    """

    paper: ClassVar[str] = "2103.10385"
    where: ClassVar[str] = "embed"
    hosts: ClassVar[frozenset[str]] = frozenset({"embedding"})
    learning_rate: ClassVar[float] = 1e-3
    width_power: ClassVar[float] = 1.0  # matrices of the width train

    length: int = 20
    hidden: int | None = None

    def __post_init__(self) -> None:
        if self.length < 1 or (self.hidden is not None and self.hidden < 1):
            raise UserError(f"PTuningLSTM: length={self.length}, hidden={self.hidden}", fix="both from 1 on")

    @property
    def virtual_tokens(self) -> int:
        return self.length

    def units(self, site: Site) -> int:
        """LSTM units a direction."""
        return self.hidden or max(1, site.out_features // 2)

    def init(self, site: Site) -> dict[str, Any]:
        width, units = site.out_features, self.units(site)
        lstm = nn.LSTM(width, units, LAYERS, bidirectional=True)
        first, last = nn.Linear(2 * units, 2 * units), nn.Linear(2 * units, width)
        p: dict[str, Any] = {"E": nn.Parameter(torch.randn(self.length, width)), "lstm": dict(lstm.named_parameters())}
        return p | {"W1": first.weight, "b1": first.bias, "W2": last.weight, "b2": last.bias}

    def count(self, site: Site) -> int:
        width, h = site.out_features, self.units(site)
        lstm = sum(2 * 4 * h * (into + h + 2) for into in (width, 2 * h))
        return self.length * width + lstm + 2 * h * (2 * h + 1) + width * (2 * h + 1)

    def virtual(self, p: Any) -> Tensor:
        weights = [getattr(p.lstm, name) for name in WEIGHTS]
        zero = p.E.new_zeros(2 * LAYERS, 1, weights[1].shape[1])
        h, _, _ = torch.lstm(p.E[:, None], (zero, zero), weights, True, LAYERS, 0.0, False, True, False)
        return F.linear(F.relu(F.linear(h[:, 0], p.W1, p.b1)), p.W2, p.b2)

    def bake(self, p: Any) -> tuple[Method, dict[str, Tensor]]:
        return find("prompt_tuning")(length=self.length, start="random"), {"P": self.virtual(p)}
