"""SVDQuant: a quantized weight with its largest directions beside it in high precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.format import Format
from trimtab.core.spectrum import largest
from trimtab.storage._blocks import checked, positive
from trimtab.storage.nf4 import NF4

ITERATIONS = 4


@dataclass(frozen=True)
class SVDQuant(Format):
    """W ~ L1 L2 + q(W - L1 L2), where L1 (out, rank) and L2 (rank, in) hold the largest singular triplets of W.

    The product takes the outliers of W out of what `inner` has to store. `rounds` repeat L1 L2 = SVD(W - Q), then
    Q = q(W - L1 L2), and the best of them is kept. A LoRA that starts from a part of W (PiSSA, LoftQ, LQ-LoRA) keeps
    that part here while its site is stored in `inner`.

    Tensors: those of `inner` for the rest of W; `up` = L1 and `down` = L2, bf16 when encoded here.
    Bits per weight: those of `inner`, + 16 rank (1 / out + 1 / in).
    Error: that of `inner` on the rest, which spreads less. Encoding a decoded matrix again finds other factors.
    Of a matrix with fewer than `rank` rows or columns the factors hold everything, filled up with zeros.
    Reference: arXiv 2411.05007. Weights only: activations are not quantized, so no outliers of theirs are moved into W
    first (the paper's W diag(λ)), and the rounds are judged by the weight and not by a layer's output.
    """

    inner: Format = field(default_factory=NF4)
    rank: int = 32
    rounds: int = 3

    def __post_init__(self) -> None:
        positive(self.rank, "rank", "SVDQuant")
        positive(self.rounds, "rounds", "SVDQuant")
        if not isinstance(self.inner, Format) or isinstance(self.inner, SVDQuant) or self.inner.needs_inputs:
            raise UserError(f"SVDQuant: inner={self.inner!r} cannot store the rest", fix="e.g. inner=NF4()")

    def encode(self, W: Tensor) -> dict[str, Tensor]:
        W = checked(W, "SVDQuant")
        out, into = W.shape
        if W.is_meta:
            made = {"up": W.new_empty(out, self.rank), "down": W.new_empty(self.rank, into)}
            return {**self.inner.encode(W), **{key: value.bfloat16() for key, value in made.items()}}
        best: dict[str, Tensor] = {}
        lowest, Q = float("inf"), torch.zeros_like(W)
        for _ in range(self.rounds):
            U, S, Vt = largest(W - Q, min(self.rank, out, into), ITERATIONS)
            missing = self.rank - len(S)
            up = F.pad(U * S.sqrt(), (0, missing)).bfloat16()
            down = F.pad(S.sqrt()[:, None] * Vt, (0, 0, 0, missing)).bfloat16()
            left = W - up.float() @ down.float()
            code = self.inner.encode(left)
            Q = self.inner.decode(code, (out, into))
            error = float(torch.linalg.vector_norm(left - Q))
            if error < lowest:
                lowest, best = error, {**code, "up": up, "down": down}
        return best

    def decode(self, code: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        rest = {key: value for key, value in code.items() if key not in ("up", "down")}
        return self.inner.decode(rest, shape).addmm(code["up"].float(), code["down"].float())

    def bits(self, shape: tuple[int, ...]) -> float:
        out, into = shape
        return self.inner.bits(shape) + 16 * self.rank * (1 / out + 1 / into)
