"""SVDQuant: a quantized weight with its largest directions beside it in high precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
GRID = 20
"""Exponents of λ that are tried lie 1 / 20 apart."""
LEAST = 1e-3
"""What λ takes an input for that is hardly ever seen or has hardly a weight, times the mean of all."""


@dataclass(frozen=True)
class SVDQuant(Format):
    """W ~ L1 L2 + q(W - L1 L2), where L1 (out, rank) and L2 (rank, in) hold the largest singular triplets of W.

    The product takes the outliers of W out of what `inner` has to store. `rounds` repeat L1 L2 = SVD(W - Q), then
    Q = q(W - L1 L2), and the best of them is kept. A LoRA that starts from a part of W (PiSSA, LoftQ, LQ-LoRA) keeps
    that part here while its site is stored in `inner`.
    With `smooth`, which needs inputs x (`trimtab.calibrate`), the same is done to W diag(λ), and what is found times
    diag(1 / λ) is W: inputs that are large have finer steps. λ_j = rms(x_j)^α / max|W_j|^β, with the (α, β) out of
    (0, 0), (k / 20, 0) and (k / 20, 1 - k / 20) that changes the layer's outputs least in one round. Rounds are judged
    by the outputs too, without `smooth` by the weight.

    Tensors: those of `inner` for the rest; `up` = L1 and `down` = L2, which acts on x itself, and `smooth` = λ (in),
    bf16 when encoded here.
    Bits per weight: those of `inner`, + 16 rank (1 / out + 1 / in), with `smooth` + 16 / out.
    Error: that of `inner` on the rest, which spreads less. Encoding a decoded matrix again finds other factors, and
    without inputs λ = 1. `smooth` costs 40 rounds more, and 2 out · in² operations in each.
    Of a matrix with fewer than `rank` rows or columns the factors hold everything, filled up with zeros.
    Reference: arXiv 2411.05007. Weights only: since inputs are not quantized, they enter λ by the root mean square,
    which is what an error of a weight is multiplied with, and not by the largest.
    """

    inner: Format = field(default_factory=NF4)
    rank: int = 32
    rounds: int = 3
    smooth: bool = False

    def __post_init__(self) -> None:
        positive(self.rank, "rank", "SVDQuant")
        positive(self.rounds, "rounds", "SVDQuant")
        if not isinstance(self.inner, Format) or isinstance(self.inner, SVDQuant) or self.inner.needs_inputs:
            raise UserError(f"SVDQuant: inner={self.inner!r} cannot store the rest", fix="e.g. inner=NF4()")

    @property
    def needs_inputs(self) -> bool:
        return self.smooth

    def encode(self, W: Tensor) -> dict[str, Tensor]:
        W = checked(W, "SVDQuant")
        if W.is_meta:
            return self.blank(W)
        return self.fitted(W, W.new_ones(W.shape[1]), self.rounds, torch.linalg.vector_norm)[0]

    def encode_for(self, W: Tensor, H: Tensor) -> dict[str, Tensor]:
        if not self.smooth:
            return self.encode(W)
        W, H = checked(W, "SVDQuant"), H.to(W.device, torch.float32)
        if not bool(torch.isfinite(H).all()):
            raise UserError("SVDQuant: the inputs of a layer are not finite", fix="look at the model and the rows")

        def judge(D: Tensor) -> Tensor:
            """‖X Dᵀ‖² up to the factor in which H is known."""
            return ((D @ H) * D).sum()

        seen, size = floored(H.diagonal().clamp_min(0).sqrt()), floored(W.abs().amax(0))
        tried = (levelled(seen**alpha / size**beta) for alpha, beta in exponents())
        smoothest = min(tried, key=lambda scale: self.fitted(W, scale, 1, judge)[1])
        return self.fitted(W, smoothest, self.rounds, judge)[0]

    def fitted(
        self, W: Tensor, scale: Tensor, rounds: int, judge: Callable[[Tensor], Tensor]
    ) -> tuple[dict[str, Tensor], float]:
        """The best codes of so many rounds for λ = `scale` (in), and what `judge` says of the error of W."""
        out, into = W.shape
        best: dict[str, Tensor] = {}
        lowest, Q = float("inf"), torch.zeros_like(W)
        for _ in range(rounds):
            U, S, Vt = largest(W * scale - Q, min(self.rank, out, into), ITERATIONS)
            missing = self.rank - len(S)
            up = F.pad(U * S.sqrt(), (0, missing)).bfloat16()
            down = F.pad(S.sqrt()[:, None] * Vt / scale, (0, 0, 0, missing)).bfloat16()
            left = (W - up.float() @ down.float()) * scale
            code = self.inner.encode(left)
            Q = self.inner.decode(code, (out, into))
            error = float(judge((left - Q) / scale))
            if not best or error < lowest:
                lowest, best = error, {**code, "up": up, "down": down}
        return {**best, "smooth": scale.bfloat16()} if self.smooth else best, lowest

    def blank(self, W: Tensor) -> dict[str, Tensor]:
        """Tensors of the right sizes on the meta device."""
        made = {"up": W.new_empty(W.shape[0], self.rank), "down": W.new_empty(self.rank, W.shape[1])}
        made |= {"smooth": W.new_empty(W.shape[1])} if self.smooth else {}
        return {**self.inner.encode(W), **{key: value.bfloat16() for key, value in made.items()}}

    def decode(self, code: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        rest = {key: value for key, value in code.items() if key not in ("up", "down", "smooth")}
        left = self.inner.decode(rest, shape)
        left = left / code["smooth"].float() if self.smooth else left
        return left.addmm(code["up"].float(), code["down"].float())

    def bits(self, shape: tuple[int, ...]) -> float:
        out, into = shape
        return self.inner.bits(shape) + 16 * self.rank * (1 / out + 1 / into) + (16 / out if self.smooth else 0.0)


def exponents() -> Iterator[tuple[float, float]]:
    """The (α, β) that are tried."""
    yield 0.0, 0.0
    for k in range(1, GRID + 1):
        yield k / GRID, 0.0
        if k < GRID:
            yield k / GRID, 1 - k / GRID


def floored(sizes: Tensor) -> Tensor:
    """Sizes of the inputs, or of the columns they meet, of which none is next to nothing."""
    return sizes.clamp_min(max(LEAST * float(sizes.mean()), torch.finfo(sizes.dtype).tiny))


def levelled(scale: Tensor) -> Tensor:
    """λ with a geometric mean of 1, in the digits it is kept in."""
    return (scale / scale.log().mean().exp()).bfloat16().float()
