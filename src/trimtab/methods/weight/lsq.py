"""LSQ: quantization-aware training in which the step between two values trains too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.fake_quantized import FakeQuantized, straight
from trimtab.core.site import Site

LEAST = 1e-8
"""A smaller step is taken for this one: V / s has to be a number."""


@dataclass(frozen=True)
class LSQ(FakeQuantized):
    """W' = s · round(clamp(V / s, −Q_N, Q_P)), Q_N = 2^(bits−1), Q_P = Q_N − 1; gradients pass `round` as they are.

    So ∂W'/∂V = 1 inside the clamp and 0 outside; ∂W'/∂s = round(V/s) − V/s inside, −Q_N or Q_P outside, times
    1/√(N Q_P) with N the weights that share a step. V (out, in), and c (out) where there is a bias, start as W and b;
    s (out, 1), or (out, in / group_size), as 2 mean|W| / √Q_P. Trains in·out + out values and the steps: as much memory
    as full fine-tuning, and some copies of the weight per pass. What is saved are the codes with their steps. Mergeable
    (W' replaces W), exactly also into affine codes of equal bits and groups.
    arXiv 1902.08153, which has one step per layer; here one per output or group, and N is counted so.
    """

    paper: ClassVar[str] = "1902.08153"

    def steps(self, W: Tensor) -> dict[str, Any]:
        s = 2 * W.abs().mean(-1) / self.top**0.5
        return {"s": nn.Parameter(torch.where(s > 0, s, torch.ones_like(s)))}

    def count(self, site: Site) -> int:
        steps = site.out_features * (site.in_features // (self.group_size or site.in_features))
        return super().count(site) + (steps if self.trains else 0)

    def rounded(self, V: Tensor, p: Any) -> Tensor:
        share = (V.shape[-1] * self.top) ** -0.5
        s = self.apart((p.s * share + (p.s - p.s * share).detach())[..., None])
        return straight((V / s).clamp(-self.top - 1, self.top)) * s

    def stored(self, V: Tensor, p: Any) -> tuple[Tensor, Tensor, Tensor]:
        s = self.apart(p.s.detach())
        q = (V / s[..., None]).clamp(-self.top - 1, self.top).round()
        return q + self.top + 1, s, torch.full_like(s, self.top + 1)

    def apart(self, s: Tensor) -> Tensor:
        """Steps no nearer to 0 than `LEAST`; of either sign, as they trained."""
        return torch.where(s.abs() < LEAST, torch.full_like(s, LEAST), s)

    @property
    def top(self) -> int:
        """Q_P, the largest code."""
        return int(2 ** (self.code_bits - 1)) - 1
