"""HQQ: affine codes whose zero points are fitted without data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.bits import pack
from trimtab.core.errors import UserError
from trimtab.core.format import Format
from trimtab.storage._blocks import checked, positive
from trimtab.storage.affine import Affine


@dataclass(frozen=True)
class HQQ(Format):
    """W ~ (q − zero) scale per group, q = round(W / scale + zero), with the zero of least Σ |W − (q − zero) scale|^p.

    p = `power` < 1: large errors weigh little. Half-quadratic splitting: E = shrink(W − Ŵ) takes the large errors out,
    shrink(d) = sign(d)·max(0, |d| − |d|^(p−1)/β), then zero = mean over the group of q − (W − E)/scale. Up to `rounds`
    of it from the plain affine code, as long as the mean of |W − Ŵ| falls over the matrix; the best is kept. Only zero
    points move; scales are (max − min)/(2^bits − 1).

    Tensors and bits per weight: those of `Affine`, at 4 bits and groups of 64: 5. Merging and training over it are too.
    Error: of a single weight up to the whole group's range, in the mean below the plain code's. Encoding a decoded
    matrix again finds other zeros. Costs `rounds` passes over W when encoding.
    Reference: Badri and Shaji 2023 (no arXiv id); β = 10 and p = 0.7 of their code, which never raises β either. It
    rounds zero to an integer before the first round at 4 bits; here it is not.
    """

    code_bits: int = 4
    group_size: int = 64
    power: float = 0.7
    beta: float = 10.0
    rounds: int = 20

    def __post_init__(self) -> None:
        Affine(self.code_bits, self.group_size)
        positive(self.group_size, "group_size", "HQQ")
        if not 0 < self.power <= 1 or self.beta <= 0 or self.rounds < 1:
            raise UserError(
                f"HQQ: power={self.power}, beta={self.beta}, rounds={self.rounds}",
                fix="power above 0 and at most 1, beta above 0, rounds of 1 or more",
            )

    @property
    def affine(self) -> Affine:
        """The format that decodes it."""
        return Affine(self.code_bits, self.group_size)

    def encode(self, W: Tensor) -> dict[str, Tensor]:
        plain = self.affine.encode(W)
        if W.is_meta:
            return plain
        groups = checked(W, "HQQ").view(*plain["scale"].shape, self.group_size)
        scale, zero = plain["scale"][..., None], plain["zero"][..., None]
        top = 2**self.code_bits - 1
        q = (groups / scale + zero).round_().clamp_(0, top)
        lowest, best = float((groups - (q - zero) * scale).abs().mean()), (q, zero)
        for _ in range(self.rounds):
            E = shrink(groups - (q - zero) * scale, self.power, self.beta)
            zero = (q - (groups - E) / scale).mean(-1, keepdim=True)
            q = (groups / scale + zero).round_().clamp_(0, top)
            error = float((groups - (q - zero) * scale).abs().mean())
            if error >= lowest:
                break
            lowest, best = error, (q, zero)
        q, zero = best
        return {
            "codes": pack(q.to(torch.uint8).view(-1), self.code_bits),
            "scale": plain["scale"],
            "zero": zero[..., 0].contiguous(),
        }

    def decode(self, code: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        return self.affine.decode(code, shape)

    def bits(self, shape: tuple[int, ...]) -> float:
        return self.affine.bits(shape)


def shrink(d: Tensor, power: float, beta: float) -> Tensor:
    """argmin over E of |E|^p + β/2 (E − d)², nearly: sign(d)·max(0, |d| − |d|^(p − 1) / β); 0 at 0."""
    size = d.abs()
    return d.sign() * (size - size.pow(power - 1) / beta).clamp_(min=0).nan_to_num_(0.0)
