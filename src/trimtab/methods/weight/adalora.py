"""AdaLoRA: a budget of ranks that moves to the sites where they matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.low_rank import LowRank, key_of
from trimtab.core.site import Site

FACTORS = ("P", "lambda_", "Q")


@dataclass(frozen=True)
class AdaLoRA(LowRank):
    """W' = W + s·P diag(λ) Q, with s = alpha / rank; the least important λ_k of all sites go to 0.

    P (out, rank) and Q (rank, in) ~ N(0, 0.02²), λ (rank) = 0. The loss gets `orthogonality`·(‖PᵀP − I‖ + ‖QQᵀ − I‖),
    averaged over all matrices. A value w has the sensitivity I = |w·∂w|, and Ī, Ū are the running means (`smoothing`)
    of I and of |I − Ī|; a triplet counts s(λ_k) + mean_j s(Q_kj) + mean_i s(P_ik), s = Ī·Ū. From step `begin` to `end`
    the mean rank falls from `rank` to `target` by a cubic law; every `every` steps, and at each step after `end`, λ of
    the least important triplets over all sites is set to 0. One pruned before `end` may come back, later none does.
    Costs 2·rank·(in + out) multiplications per token and two more tensors per trained one; nothing after merging.
    Mergeable.
    arXiv 2303.10512. Ranks are given out by the scores of the step before, a site hears of a step before the next one.
    The norm is not squared and s keeps the first rank, both as in the official code. `on_step` reads the gradients.
    """

    paper: ClassVar[str] = "2303.10512"
    learning_rate: ClassVar[float] = 1.5e-3
    width_power: ClassVar[float] = 1.0

    rank: int = 12
    target: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    begin: int = 100
    end: int = 1000
    every: int = 10
    smoothing: float = 0.85
    orthogonality: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.target <= self.rank or not 0 <= self.begin <= self.end or self.every < 1:
            raise UserError(
                f"AdaLoRA: target={self.target} of rank={self.rank}, every={self.every}, {self.begin} to {self.end}",
                fix="1 <= target <= rank, 0 <= begin <= end, every of 1 or more",
            )

    def shared(self, sites: Sequence[Site]) -> dict[str, Any]:
        """`key` (sites) tells a site which row of `scores` (2, sites, rank), of odd and even steps, is its own."""
        key = torch.tensor([key_of(site) for site in sites])
        return {"key": key, "scores": torch.zeros(2, len(sites), self.rank)}

    def init(self, site: Site) -> dict[str, Any]:
        shapes = {"P": (site.out_features, self.rank), "lambda_": (self.rank,), "Q": (self.rank, site.in_features)}
        p: dict[str, Any] = {name: nn.Parameter(0.02 * torch.randn(shape)) for name, shape in shapes.items()}
        p["lambda_"] = nn.Parameter(torch.zeros(self.rank))
        p["importance"] = {name: torch.zeros(shape) for name, shape in shapes.items()}
        p["uncertainty"] = {name: torch.zeros(shape) for name, shape in shapes.items()}
        return p | {"key": torch.tensor(key_of(site))}

    def count(self, site: Site) -> int:
        return self.rank * (site.in_features + site.out_features + 1)

    def factors(self, p: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return (self.alpha / self.rank) * p.P, p.lambda_[:, None] * p.Q

    def penalty(self, p: Any) -> Tensor | None:
        matrices = 2 * len(p.shared.key)
        eye = torch.eye(self.rank, device=p.P.device, dtype=p.P.dtype)
        off = [torch.linalg.matrix_norm(M - eye).sum() for M in (p.P.mT @ p.P, p.Q @ p.Q.mT)]
        return (self.orthogonality / matrices) * (off[0] + off[1])

    def over(self, steps: int) -> AdaLoRA:
        """Where `end` is behind the last step: from a tenth of the run to seven tenths."""
        if self.end <= steps:
            return self
        begin = max(1, steps // 10)
        end = max(begin, 7 * steps // 10)
        return replace(self, begin=begin, end=end, every=min(self.every, max(1, (end - begin) // 10)))

    def kept(self, step: int) -> float:
        """The mean rank that a step leaves."""
        left = 1 - min(1.0, max(0, step - self.begin) / max(1, self.end - self.begin))
        return self.rank if step < self.begin else self.target + (self.rank - self.target) * left**3

    @torch.no_grad()
    def on_step(self, p: Any, step: int) -> None:
        row = int((p.shared.key == p.key.flatten()[0]).nonzero()[0, 0])
        before, now = p.shared.scores[(step - 1) % 2], p.shared.scores[step % 2]
        if step > self.end or (step >= self.begin and (step - self.begin) % self.every == 0):
            drop = before.numel() - int(self.kept(step) * len(before))
            if drop:
                bar = before.flatten().kthvalue(drop).values
                p.lambda_[..., before[row] <= bar] = 0
        now[row] = self.measured(p) if step <= self.end else before[row]

    def measured(self, p: Any) -> Tensor:
        """Scores (rank) of a site's triplets, from the gradients that the step was made with."""
        s = {}
        for name in FACTORS:
            w, mean, spread = getattr(p, name), getattr(p.importance, name), getattr(p.uncertainty, name)
            if w.grad is None:
                raise UserError(
                    "AdaLoRA: ranks are given out by gradients, and there are none after this step",
                    fix="call on_step before the gradients are cleared",
                )
            sensitivity = (w * w.grad).abs()
            mean.lerp_(sensitivity, 1 - self.smoothing)
            spread.lerp_((sensitivity - mean).abs(), 1 - self.smoothing)
            s[name] = mean * spread
        score = s["lambda_"] + s["P"].mean(-2) + s["Q"].mean(-1)
        return score.reshape(-1, self.rank).mean(0)
