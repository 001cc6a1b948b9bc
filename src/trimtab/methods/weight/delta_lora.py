"""Delta-LoRA: LoRA whose frozen weight follows the change of the low-rank product."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.low_rank import LowRank
from trimtab.core.site import Site


@dataclass(frozen=True)
class DeltaLoRA(LowRank):
    """W' = W_t + s·B_t A_t, with W_{t+1} = W_t + share·s·(B_{t+1}A_{t+1} − B_t A_t) after `warmup` steps.

    s = alpha / rank; A (rank, in) ~ U(±1/√in), B (out, rank) = 0. The sum over steps telescopes to W_t = W +
    share·s·(B_t A_t − B_K A_K), so only the pair of the warmup's last step is kept, `A_K` and `B_K`, zero at the
    start: W keeps its bits and may be quantized. The gradient is that of s·B A alone, as in the paper.
    Costs 6·rank·(in + out) multiplications per token; nothing after merging. Mergeable.
    arXiv 2309.02411. No dropout, as the paper asks: the change of B A would then not be the step's.
    """

    paper: ClassVar[str] = "2309.02411"
    learning_rate: ClassVar[float] = 1e-3
    width_power: ClassVar[float] = 1.0

    rank: int = 8
    alpha: float = 16.0
    share: float = 0.5
    warmup: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup < 0:
            raise UserError(f"DeltaLoRA: warmup={self.warmup}", fix="warmup of 0 or more steps")

    def init(self, site: Site) -> dict[str, Any]:
        A = nn.init.kaiming_uniform_(torch.empty(self.rank, site.in_features), a=math.sqrt(5))
        B = torch.zeros(site.out_features, self.rank)
        return {"A": nn.Parameter(A), "B": nn.Parameter(B), "A_K": torch.zeros_like(A), "B_K": torch.zeros_like(B)}

    def over(self, steps: int) -> DeltaLoRA:
        """Where the run would end in the warmup: a warmup of a tenth of it."""
        return self if self.warmup < steps else replace(self, warmup=steps // 10)

    def count(self, site: Site) -> int:
        return self.rank * (site.in_features + site.out_features)

    @torch.no_grad()
    def on_step(self, p: Any, step: int) -> None:
        if step <= self.warmup:
            p.A_K.copy_(p.A)
            p.B_K.copy_(p.B)

    def factors(self, p: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        B = torch.cat([p.B, self.share * p.B.detach(), -self.share * p.B_K], 1)
        return (self.alpha / self.rank) * B, torch.cat([p.A, p.A.detach(), p.A_K], 0)
