"""ReLoRA: LoRA begun anew several times, so that the ranks add up."""

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
class ReLoRA(LowRank):
    """W' = W + s·B A + s·Σ_t B_t A_t, with s = alpha / rank and (B_t, A_t) the pairs of earlier rounds.

    A (rank, in) ~ U(±1/√in) and B (out, rank) = 0 are trained; every `every` steps, `restarts` times, they are added to
    the fixed sum and drawn anew. `past_A` (restarts·rank, in) and `past_B` (out, restarts·rank) hold that sum, zero at
    the start: W keeps its bits and may be quantized, and the adapter on disk stays of low rank.
    Costs 2·rank·(1 + restarts)·(in + out) multiplications per token; nothing after merging. Mergeable.
    arXiv 2307.05695. The paper merges into W, which is the same sum. It also prunes the optimizer's state at a restart
    and warms the learning rate up again: `stale` tells a training loop which tensors that concerns.
    """

    paper: ClassVar[str] = "2307.05695"
    learning_rate: ClassVar[float] = 1.5e-3
    width_power: ClassVar[float] = 1.0

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    every: int = 1000
    restarts: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1 or self.restarts < 0:
            raise UserError(
                f"ReLoRA: every={self.every}, restarts={self.restarts}", fix="every of 1 or more, restarts of 0 or more"
            )

    def init(self, site: Site) -> dict[str, Any]:
        A = nn.init.kaiming_uniform_(torch.empty(self.rank, site.in_features), a=math.sqrt(5))
        return {
            "A": nn.Parameter(A),
            "B": nn.Parameter(torch.zeros(site.out_features, self.rank)),
            "past_A": torch.zeros(self.restarts * self.rank, site.in_features),
            "past_B": torch.zeros(site.out_features, self.restarts * self.rank),
            "seed": torch.randint(2**62, ()),
        }

    def count(self, site: Site) -> int:
        return self.rank * (site.in_features + site.out_features)

    def factors(self, p: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return (self.alpha / self.rank) * torch.cat([p.B, p.past_B], 1), torch.cat([p.A, p.past_A], 0)

    def over(self, steps: int) -> ReLoRA:
        """Where the last restart is behind the last step: rounds of equal length."""
        return self if self.every * self.restarts < steps else replace(self, every=max(1, steps // (self.restarts + 1)))

    def restarts_at(self, step: int) -> bool:
        """Whether this step ends a round."""
        return step % self.every == 0 and 1 <= step // self.every <= self.restarts

    def stale(self, p: Any, step: int) -> list[Tensor]:
        """Tensors that `on_step` has drawn anew at this step: what an optimizer remembers of them is to be dropped."""
        return [p.A, p.B] if self.restarts_at(step) else []

    @torch.no_grad()
    def on_step(self, p: Any, step: int) -> None:
        if not self.restarts_at(step):
            return
        place = slice((step // self.every - 1) * self.rank, step // self.every * self.rank)
        p.past_A[..., place, :] = p.A
        p.past_B[..., place] = p.B
        generator = torch.Generator().manual_seed((int(p.seed.flatten()[0]) + step) % 2**63)
        bound = 1 / math.sqrt(p.A.shape[-1])
        drawn = torch.rand(p.A.shape, generator=generator, device="cpu")
        p.A.copy_((2 * drawn - 1) * bound)
        p.B.zero_()
