"""Structured diff pruning: a gate for every weight and one for its whole matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.gated import Gated, hard_concrete
from trimtab.core.site import Site


@dataclass(frozen=True)
class StructuredDiffPruning(Gated):
    """W' = W + z^g·z ∘ w, with one more gate z^g for the matrix, so that whole matrices can stay as they are.

    Like `DiffPruning`: z = min(1, max(0, 3·σ(n + log α) − 1.5)), n logistic noise of each step, log α = 5 +
    `gate_speed`·`gate`; w (out, in) = `value`, `gate` (out, in), `group_gate` (1) and, at the first step, the noise of
    the matrix start at 0. The loss gets `sparsity`·(Σ_i σ(log α_i) + σ(log α^g)) or, with `summed` off,
    `sparsity`·Σ_i σ(log α_i)·σ(log α^g). After step `gates_until`, or at the end,
    the `density` share of entries with the largest |z^g z_i w_i| over all sites is kept, and trained on as
    W' = W + Σ_i v_i at `index` (k), v = `value` (k).
    Costs 2·in·out + 1 trained values and a dense W' until then; afterwards k values, on disk too. Mergeable.
    arXiv 2012.07463. The paper multiplies the two; its code, from which `sparsity` is, adds them. The gradient of a
    product is, for the matrix's gate, a sum over the whole matrix, far above Adam's ε of 1e-8: it takes full steps from
    the first one on and closes the matrix within 80. A slice of a fused matrix is a group of its own. The rest as with
    `DiffPruning`.
    """

    paper: ClassVar[str] = "2012.07463"
    elastic: ClassVar[frozenset[str]] = Gated.elastic | {"group_gate", "group_noise"}

    summed: bool = True

    def init(self, site: Site) -> dict[str, Any]:
        return super().init(site) | {
            "group_gate": nn.Parameter(torch.zeros(1)),
            "group_noise": torch.zeros(1),
        }

    def count(self, site: Site) -> int:
        return super().count(site) + 1

    def gates(self, p: Any) -> Tensor:
        whole = hard_concrete(self.log_alpha(p.group_gate), p.group_noise)
        return whole * hard_concrete(self.log_alpha(p.gate), p.noise)

    def opened(self, p: Any) -> Tensor:
        each, whole = (torch.sigmoid(self.log_alpha(gate)).sum() for gate in (p.gate, p.group_gate))
        return each + whole if self.summed else each * whole

    def trained(self, p: Any) -> list[Tensor]:
        return [*super().trained(p), p.group_gate]

    def noises(self, p: Any) -> list[Tensor]:
        return [*super().noises(p), p.group_noise]
