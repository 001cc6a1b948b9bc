"""Diff pruning: learn an offset for every weight and which few of them are needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.core.gated import Gated, hard_concrete


@dataclass(frozen=True)
class DiffPruning(Gated):
    """W' = W + z ∘ w, z_i = min(1, max(0, 3·σ(n_i + log α_i) − 1.5)), n_i logistic noise, drawn anew at each step.

    `value` w (out, in) = 0; log α = 5 + `gate_speed`·`gate`, with `gate` (out, in) = 0. The loss gets
    `sparsity`·Σ σ(log α_i), the expected number of open gates. After step `gates_until`, or at the end of training, the
    `density` share of entries with the largest |z_i w_i| over all sites is kept and the rest dropped: W' = W + Σ_i v_i
    at `index` (k), v = `value` (k), trained on with this fixed mask. Outside training z is that of the last noise.
    Costs 2·in·out trained values and a dense W' until then; afterwards k values and nothing else, on disk too.
    Mergeable.
    arXiv 2012.07463. `gate_speed` stands for the paper's own learning rate of the gates, 0.1, and leaves the gradient
    of log α as it is; both rates fall together here, there the gates' does not. A run of at most `gates_until` steps
    fixes the mask after half of them: the paper gives both phases as many epochs. The optimizer starts anew at the
    fixed mask, as in the official code. A head trained beside it is outside the budget; the official code counts it.
    """

    paper: ClassVar[str] = "2012.07463"

    def gates(self, p: Any) -> Tensor:
        return hard_concrete(self.log_alpha(p.gate), p.noise)

    def opened(self, p: Any) -> Tensor:
        return torch.sigmoid(self.log_alpha(p.gate)).sum()
