"""Init[A]: LoRA's usual start."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from trimtab.core.site import Site
from trimtab.core.start import Factors, Start


@dataclass(frozen=True)
class InitA(Start):
    """A ~ U(±1/√in), B = 0.

    The uniform A (rank, in) is the official code's, the paper says Gaussian. At an embedding B ~ N(0, 1) and A = 0,
    since its input is one-hot. Against Init[B] it bears a larger learning rate.
    arXiv 2106.09685; the comparison is 2406.08447.
    """

    paper: ClassVar[str] = "2106.09685"
    takes_out: ClassVar[bool] = False

    def factors(self, site: Site, rank: int, scale: float) -> Factors:
        A, B = torch.zeros(rank, site.in_features), torch.zeros(site.out_features, rank)
        if site.kind == "embedding":
            nn.init.normal_(B)
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        return Factors(A, B)
