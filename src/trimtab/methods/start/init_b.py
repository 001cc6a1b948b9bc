"""Init[B]: LoRA with the other factor at zero."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from trimtab.core.site import Site
from trimtab.core.start import Factors, Start


@dataclass(frozen=True)
class InitB(Start):
    """B ~ U(±1/√rank), A = 0.

    Activations inside the branch start small, at the price of a smaller best learning rate. At an embedding
    B (out, rank) ~ N(0, 1).
    arXiv 2406.08447.
    """

    paper: ClassVar[str] = "2406.08447"
    takes_out: ClassVar[bool] = False

    def factors(self, site: Site, rank: int, scale: float) -> Factors:
        A, B = torch.zeros(rank, site.in_features), torch.zeros(site.out_features, rank)
        if site.kind == "embedding":
            nn.init.normal_(B)
        else:
            nn.init.kaiming_uniform_(B, a=math.sqrt(5))
        return Factors(A, B)
