"""C3A: updates by circular convolution, of high rank from few values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.blocks import require_blocks
from trimtab.core.method import WeightMethod
from trimtab.core.site import Base, Site


@dataclass(frozen=True)
class C3A(WeightMethod):
    """W' = W + C / in, with C made of circulant blocks: C_oi[k, n] = w_oi[(n − k) mod block_size].

    w (out / block_size, in / block_size, block_size) = 0. A block acts by fast Fourier transform: y_o = irfft(Σ_i
    conj(rfft(w_oi)) ∘ rfft(x_i)) / in, about in·out / block_size multiplications per token (bf16 has no such
    transform: there a row of blocks is built at a time); nothing after merging. Mergeable.
    arXiv 2407.19342. The start at zero is one of PEFT's; its other ones change the model before the first step. What
    PEFT (0.21) hands on as the gradient of the input belongs to another map, so layers below train on wrong gradients.
    """

    paper: ClassVar[str] = "2407.19342"
    learning_rate: ClassVar[float] = 3e-1

    block_size: int = 64

    def init(self, site: Site) -> dict[str, Any]:
        b = self.block_size
        require_blocks("C3A", site, b, site.out_features, site.in_features)
        return {"w": nn.Parameter(torch.zeros(site.out_features // b, site.in_features // b, b))}

    def count(self, site: Site) -> int:
        return site.out_features * site.in_features // self.block_size

    def weight(self, W: Tensor, p: Any) -> Tensor:
        C = self.circulant(p.w)  # (out/b, in/b, n, k)
        return W + C.movedim(-1, -3).flatten(-2).flatten(-3, -2) / W.shape[-1]

    def circulant(self, w: Tensor) -> Tensor:
        """C[..., n, k] = w[..., (n − k) mod block_size]."""
        at = torch.arange(self.block_size, device=w.device)
        return w[..., (at[:, None] - at) % self.block_size]

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        if x.element_size() < 4:
            rows = [x @ self.circulant(w).flatten(0, 1) for w in p.w]  # (in, block_size) each
            return base(x) + torch.cat(rows, -1) / x.shape[-1]
        X = torch.fft.rfft(x.unflatten(-1, (-1, self.block_size)))
        Y = torch.einsum("...if,oif->...of", X, torch.fft.rfft(p.w).conj())
        return base(x) + torch.fft.irfft(Y, self.block_size).flatten(-2) / x.shape[-1]
