"""VB-LoRA: LoRA's factors put together from one bank of vectors for the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.low_rank import LowRank
from trimtab.core.site import Site


@dataclass(frozen=True)
class VBLoRA(LowRank):
    """W' = W + B A, every piece of A's rows and B's columns = Σ_{j ∈ top-k(g)} softmax(g)_j·v_j over a bank of vectors.

    The bank v (vectors, length) ~ U(±0.02) is trained and shared by all sites. Each piece of `length` values has logits
    g (vectors) ~ N(0, 0.1²) of its own: `a` (rank, in / length, vectors) for A (rank, in), `b` (out / length, rank,
    vectors) for B (out, rank); the softmax is over the k largest.
    Costs LoRA's 2·rank·(in + out) multiplications per token and rank·(in + out)·k per step; nothing after merging.
    Mergeable.
    arXiv 2405.15179. No alpha. The official runs give the bank a tenth of the logits' learning rate. A side that
    `length` does not divide takes one more piece, cut to size; the official code refuses it.
    """

    paper: ClassVar[str] = "2405.15179"
    learning_rate: ClassVar[float] = 4e-3
    laws: ClassVar[Mapping[str, str]] = {"identity": "A and B are both mixtures of the bank, small but not zero"}

    rank: int = 4
    vectors: int = 256
    length: int = 256
    k: int = 2
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.k <= self.vectors or self.length < 1:
            raise UserError(
                f"VBLoRA: k={self.k}, vectors={self.vectors}, length={self.length}",
                fix="1 <= k <= vectors, length >= 1",
            )

    def shared(self, sites: Sequence[Site]) -> dict[str, Any]:
        return {"bank": nn.Parameter(torch.empty(self.vectors, self.length).uniform_(-0.02, 0.02))}

    def count_shared(self, sites: Sequence[Site]) -> int:
        return self.vectors * self.length

    def pieces(self, size: int) -> int:
        return -(-size // self.length)

    def init(self, site: Site) -> dict[str, Any]:
        a, b = self.pieces(site.in_features), self.pieces(site.out_features)
        g = 0.1 * torch.randn(self.rank, self.vectors, a + b)
        of_a, of_b = g[..., :a].transpose(1, 2), g[..., a:].permute(2, 0, 1)
        return {"a": nn.Parameter(of_a.contiguous()), "b": nn.Parameter(of_b.contiguous())}

    def count(self, site: Site) -> int:
        return self.rank * self.vectors * (self.pieces(site.in_features) + self.pieces(site.out_features))

    def factors(self, p: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        A = self.mixed(p.a, p.shared.bank).flatten(1)[:, : shape[1]]
        B = self.mixed(p.b, p.shared.bank).transpose(1, 2).flatten(0, 1)[: shape[0]]
        return B, A

    def mixed(self, g: Tensor, v: Tensor) -> Tensor:
        """The pieces (..., length) that logits g (..., vectors) choose."""
        top, chosen = g.topk(self.k, -1)
        return (top.softmax(-1)[..., None] * v[chosen]).sum(-2)
