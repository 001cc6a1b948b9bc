"""LoReFT: an edit of the residual stream inside a low-rank orthonormal subspace, at chosen prompt positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.method import HiddenMethod
from trimtab.core.site import Base, Site


@dataclass(frozen=True)
class LoReFT(HiddenMethod):
    """h ← h + Rᵀ(W h + b − R h) at the first `first` and last `last` tokens of the prompt, after every block.

    R (rank, width) has orthonormal rows: the Q factor of the trained M, which starts orthogonal. W (rank, width) and b
    (rank) start as a linear layer's. With n prompt tokens at most ⌊n/2⌋ first and ⌈n/2⌉ last ones are edited;
    generated tokens never are. Costs 4·rank·width multiplications per token in prefill, none in decoding. Not
    mergeable.
    arXiv 2404.03592. The official code drops out the whole output and prepends a pad token; neither is done here.
    """

    paper: ClassVar[str] = "2404.03592"
    where: ClassVar[str] = "block"
    learning_rate: ClassVar[float] = 2e-3
    reads_batch: ClassVar[bool] = True
    laws: ClassVar[dict[str, str]] = {
        "merge": "the edit depends on the position",
        "identity": "W and b are drawn at random, as in the paper",
    }

    rank: int = 4
    first: int = 7
    last: int = 7

    def init(self, site: Site) -> dict[str, Any]:
        source = nn.Linear(site.out_features, self.rank)
        M = nn.init.orthogonal_(torch.empty(self.rank, site.out_features))
        return {"M": nn.Parameter(M), "W": source.weight, "b": source.bias}

    def count(self, site: Site) -> int:
        return 2 * self.rank * site.out_features + self.rank

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        h = base(x)
        prompt = h.new_ones(h.shape[:2], dtype=torch.bool) if base.batch is None else base.batch.prompt
        if prompt is None:
            return h
        R = orthonormal(p.M)
        edit = (F.linear(h, p.W, p.b) - F.linear(h, R)) @ R
        return h + self.positions(prompt)[..., None].to(h.dtype) * edit

    def positions(self, prompt: Tensor) -> Tensor:
        """(rows, positions) bool: the first and last prompt tokens of each row."""
        n = prompt.sum(1, keepdim=True)
        order = prompt.cumsum(1) - 1
        first = (n // 2).clamp(max=self.first)
        last = (n - n // 2).clamp(max=self.last)
        return prompt & ((order < first) | (order >= n - last))


def orthonormal(M: Tensor) -> Tensor:
    """Orthonormal rows spanning those of M, equal to M where it is orthonormal already: Q of Mᵀ = Q T, diag T > 0."""
    Q, T = torch.linalg.qr((M.float() if M.element_size() < 4 else M).mT)
    return (Q * T.diagonal().sign()).mT.to(M.dtype)
