"""Gated offsets: every entry of a weight has an offset and a hard-concrete gate; at the end few offsets are left."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.mask import check_density, largest, shares
from trimtab.core.method import WeightMethod
from trimtab.core.site import Base, Site
from trimtab.core.sparse import sparse_linear

STRETCH = 1.5
"""Gates are stretched to [-1.5, 1.5] before they are cut to [0, 1], so that exact zeros and ones have weight."""
OPEN = 5.0
"""Where log α starts: nearly every gate is open."""
LEAST = 1e-4
"""Uniform noise is kept this far from 0 and 1."""


@dataclass(frozen=True)
class Gated(WeightMethod):
    """Abstract: W' = W + z ∘ w with random gates z until `gates_until`, then W' = W + Σ_i v_i at a fixed mask.

    The fixed mask is the `density` share of entries with the largest |z ∘ w| over all sites. `value` is w (out, in)
    while there are gates and v (k) afterwards, `index` (k) the flat places, none before.
    """

    elastic: ClassVar[frozenset[str]] = frozenset({"value", "gate", "noise", "index"})
    learning_rate: ClassVar[float] = 5e-5
    """The paper's for the fixed mask on BERT-large, 1024 wide."""
    width_power: ClassVar[float] = 1.0
    laws: ClassVar[Mapping[str, str]] = {"cost": "until the mask is fixed every entry has an offset, so W' is built"}

    density: float = 0.005
    sparsity: float = 1.25e-7
    gates_until: int = 1000
    gate_speed: int = 2000

    def __post_init__(self) -> None:
        check_density(self, self.density)
        if self.sparsity < 0 or self.gates_until < 1 or self.gate_speed < 1:
            raise UserError(
                f"{type(self).__name__}: sparsity={self.sparsity!r}, gates_until={self.gates_until!r}, "
                f"gate_speed={self.gate_speed!r}",
                fix="sparsity of 0 or more, the others of 1 or more",
            )

    @abstractmethod
    def gates(self, p: Any) -> Tensor:
        """z (out, in), from the noise of this step."""

    @abstractmethod
    def opened(self, p: Any) -> Tensor:
        """Σ_i P(z_i > 0): what the penalty counts."""

    def init(self, site: Site) -> dict[str, Any]:
        shape = site.base.shape
        return {
            "value": nn.Parameter(torch.zeros(shape)),
            "gate": nn.Parameter(torch.zeros(shape)),
            "noise": logistic(torch.rand(shape)),
            "index": torch.zeros(0, dtype=torch.long),
            "seed": torch.randint(2**62, ()),
        }

    def count(self, site: Site) -> int:
        return 2 * site.out_features * site.in_features

    def log_alpha(self, gate: Tensor) -> Tensor:
        """Where a gate stands. It moves `gate_speed` times as fast as an offset, and its gradient is that of log α:
        as with a learning rate of its own, and not `gate_speed` times that, which would drown Adam's ε."""
        moved: Tensor = OPEN + self.gate_speed * gate.detach()
        return moved + (gate - gate.detach())

    def weight(self, W: Tensor, p: Any) -> Tensor:
        if fixed(p):
            return W.flatten().index_add(0, p.index, p.value.to(W.dtype)).view_as(W)
        return W + self.gates(p) * p.value

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        if fixed(p):
            return base(x) + sparse_linear(x, p.value, p.index, base.shape)
        return super().forward(x, base, p)

    def penalty(self, p: Any) -> Tensor | None:
        return None if fixed(p) else self.sparsity * self.opened(p)

    @torch.no_grad()
    def on_step(self, p: Any, step: int) -> None:
        """Draw the gates' noise of the next step, which depends on the site's seed and the step only."""
        if not fixed(p):
            generator = torch.Generator().manual_seed((int(p.seed) + step) % 2**63)
            for noise in self.noises(p):
                noise.copy_(logistic(torch.rand(noise.shape, generator=generator, device="cpu")))

    def noises(self, p: Any) -> list[Tensor]:
        """The tensors of noise that are drawn at each step."""
        return [p.noise]

    def trained(self, p: Any) -> list[Tensor]:
        """The tensors of trained gates."""
        return [p.gate]

    def over(self, steps: int) -> Gated:
        """Where the gates would stay to the end: gone after half of the run, as the paper divides it."""
        return self if self.gates_until < steps or steps < 2 else replace(self, gates_until=steps // 2)

    def due(self, step: int | None) -> bool:
        return step is None or step == self.gates_until

    def stale(self, p: Any, step: int) -> list[Tensor]:
        return [p.value] if step == self.gates_until else []

    @torch.no_grad()
    def settle(self, sites: Mapping[str, Any], statistics: Mapping[str, Tensor], step: int | None) -> None:
        """Fix the mask; v starts at w where training goes on, and at z ∘ w, what was computed, where it ends."""
        gated = [p for p in sites.values() if not fixed(p)]
        if not gated:
            return
        offsets = [(self.gates(p) * p.value).flatten() for p in gated]
        scores = [offset.abs() for offset in offsets]
        for p, offset, score, keep in zip(gated, offsets, scores, shares(scores, self.density).tolist(), strict=True):
            index = largest(score, keep)
            p.index = index
            p.value.data = (offset if step is None else p.value.flatten())[index].clone()
            p.value.grad = None
            for used in (*self.trained(p), *self.noises(p)):
                used.data, used.grad = used.new_zeros(0), None


def fixed(p: Any) -> bool:
    """Whether the mask is fixed and the gates are gone."""
    return bool(p.value.ndim == 1)


def logistic(uniform: Tensor) -> Tensor:
    """log u − log(1 − u) for u in (0, 1)."""
    return torch.logit(uniform, LEAST)


def hard_concrete(log_alpha: Tensor, noise: Tensor) -> Tensor:
    """z = min(1, max(0, s·(r − l) + l)) with s = σ(noise + log α), l = −r; the temperature is 1."""
    return (torch.sigmoid(noise + log_alpha) * (2 * STRETCH) - STRETCH).clamp(0, 1)
