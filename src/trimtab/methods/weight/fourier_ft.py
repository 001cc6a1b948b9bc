"""FourierFT: a few coefficients of the weight update's spectrum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import WeightMethod
from trimtab.core.site import Site


@dataclass(frozen=True)
class FourierFT(WeightMethod):
    """W' = W + alpha·Re(ifft2(F)), with F (out, in) zero but for a few random places, which hold the trained c.

    c (coefficients) = 0; sites of one shape share the places, drawn once from `entry_seed`, so that a file of PEFT,
    which keeps the seed alone, says as much. Costs one inverse transform of the weight's size per step, in fp32;
    nothing after merging. Mergeable.
    arXiv 2405.03003, which starts c ~ N(0, 1); zero is exactly the pretrained model and has the same gradient, since
    the update is linear in c.
    """

    paper: ClassVar[str] = "2405.03003"
    learning_rate: ClassVar[float] = 5e-2
    laws: ClassVar[Mapping[str, str]] = {"cost": "the transform of a spectrum has the weight's size"}

    coefficients: int = 1000
    alpha: float = 150.0
    entry_seed: int = 777

    def __post_init__(self) -> None:
        if self.coefficients < 1 or self.alpha <= 0:
            raise UserError(
                f"FourierFT: coefficients={self.coefficients}, alpha={self.alpha}", fix="1000 and 150, for example"
            )

    def shared(self, sites: Sequence[Site]) -> dict[str, Any]:
        shapes = dict.fromkeys((site.out_features, site.in_features) for site in sites)
        meta = sites[0].base.weight.is_meta
        return {f"places_{out}_{into}": self.places(out * into, meta) for out, into in shapes}

    def places(self, size: int, meta: bool) -> Tensor:
        """Flat places in a spectrum of this size."""
        if meta:
            return torch.empty(min(self.coefficients, size), dtype=torch.long)
        drawn = torch.Generator().manual_seed(self.entry_seed)
        return torch.randperm(size, generator=drawn, device="cpu")[: self.coefficients]

    def init(self, site: Site) -> dict[str, Any]:
        return {"c": nn.Parameter(torch.zeros(self.count(site)))}

    def count(self, site: Site) -> int:
        return min(self.coefficients, site.out_features * site.in_features)

    def weight(self, W: Tensor, p: Any) -> Tensor:
        out, into = W.shape[-2:]
        places = getattr(p.shared, f"places_{out}_{into}")
        c = p.c.float() if p.c.element_size() < 4 else p.c
        F = c.new_zeros(*c.shape[:-1], out * into).index_copy(-1, places, c).unflatten(-1, (out, into))
        return W + (self.alpha * torch.fft.ifft2(F).real).to(W.dtype)
