"""P-tuning: a soft prompt that a small network makes while it is trained."""

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


@dataclass(frozen=True)
class PTuning(InputMethod):
    """X ← [P; X] with P = relu(relu(E W1ᵀ + b1) W2ᵀ + b2) W3ᵀ + b3 while training.

    E (length, width) ~ N(0, 1); W1 (hidden, width), W2 (hidden, hidden), W3 (width, hidden) and their biases start as
    linear layers; `hidden=None` is the width. Baked, only P (length, width) is left: a prompt of prompt tuning. Adds
    `length` positions to every row. Not mergeable.
    arXiv 2103.10385, with the network PEFT has for it; the paper's own, with an LSTM, is `p_tuning_lstm`. The prompt
    stands in front, not inside a cloze template.
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
            raise UserError(f"PTuning: length={self.length}, hidden={self.hidden}", fix="both from 1 on")

    @property
    def virtual_tokens(self) -> int:
        return self.length

    def init(self, site: Site) -> dict[str, Any]:
        width = site.out_features
        hidden = self.hidden or width
        p: dict[str, Any] = {"E": nn.Parameter(torch.randn(self.length, width))}
        for number, (into, out) in enumerate(((width, hidden), (hidden, hidden), (hidden, width)), 1):
            layer = nn.Linear(into, out)
            p |= {f"W{number}": layer.weight, f"b{number}": layer.bias}
        return p

    def count(self, site: Site) -> int:
        width = site.out_features
        hidden = self.hidden or width
        return self.length * width + hidden * (2 * width + hidden + 2) + width

    def virtual(self, p: Any) -> Tensor:
        z = F.relu(F.linear(F.relu(F.linear(p.E, p.W1, p.b1)), p.W2, p.b2))
        return F.linear(z, p.W3, p.b3)

    def bake(self, p: Any) -> tuple[Method, dict[str, Tensor]]:
        return find("prompt_tuning")(length=self.length, start="random"), {"P": self.virtual(p)}
