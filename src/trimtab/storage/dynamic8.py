"""bitsandbytes' dynamic 8-bit map: levels that are dense near zero, one scale per block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.format import Format
from trimtab.storage._blocks import block_absmax, blocks, checked, lookup, positive, scale_blocks


def dynamic_map(signed: bool) -> Tensor:
    """The 256 levels, sorted: decades 1e-6 .. 1, each with twice the points of the one below, plus 0 and 1.

    Decade i has 2^i (signed: of each sign) or 2^(i+1) points: the midpoints of as many equal parts of [0.1, 1], times
    10^(i-6). Signed levels run from -0.993 to 1, unsigned ones from 0 to 1.
    """
    levels = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (0 if signed else 1)) + 1, dtype=torch.float32, device="cpu")
        middles = (edges[:-1] + edges[1:]) / 2
        levels += (10 ** (decade - 6) * middles).tolist()
        if signed:
            levels += (-(10 ** (decade - 6)) * middles).tolist()
    return torch.tensor(sorted(levels), dtype=torch.float32, device="cpu")


MAPS = {signed: dynamic_map(signed) for signed in (True, False)}
MIDPOINTS = {signed: (levels[:-1] + levels[1:]) / 2 for signed, levels in MAPS.items()}


@dataclass(frozen=True)
class Dynamic8(Format):
    """q = index of the level nearest to (W - offset) / absmax, per block of the flattened matrix; decoded in fp32.

    `center` subtracts the mean of the whole tensor first and stores it. `signed=False` is for values that are never
    negative (second moments). Halfway between two levels the lower one is taken.

    `grid=None` is the nearest level exactly, as in bitsandbytes' GPU kernels. `grid=65536` first rounds to that many
    equal steps of [-1, 1], as its CPU kernel (0.50) does for speed: then values below 1.5e-5 of the absmax are lost,
    zero becomes 2.1e-5 of it, and codes agree bit for bit with that kernel's. What a code decodes to is the same.

    Tensors: `codes` uint8 (shape of W); `absmax` fp32 (blocks); `offset` fp32 (1) if centered.
    Bits per weight: 8 + 32 blocks / count, + 32 / count if centered.
    Error <= half a gap between levels, at most 0.00704 absmax. A negative extreme is clipped to 0.993 of itself, so
    encoding a decoded tensor again gives the same codes only in blocks whose extreme is positive, and not when centered
    (the mean moves). Reference: arXiv 2110.02861, section 2.
    """

    block_size: int = 256
    signed: bool = True
    center: bool = False
    grid: int | None = None

    def __post_init__(self) -> None:
        positive(self.block_size, "block_size", "Dynamic8")
        if self.grid is not None:
            positive(self.grid, "grid", "Dynamic8")
        if self.center and not self.signed:
            raise UserError("Dynamic8: centered values have both signs", fix="signed=True")

    def encode(self, W: Tensor) -> dict[str, Tensor]:
        flat = checked(W, "Dynamic8").view(-1)
        if not self.signed and not flat.is_meta and bool((flat < 0).any()):
            least = float(flat.min())
            raise UserError(f"Dynamic8: signed=False, but the least entry is {least:.3g}", fix="signed=True")
        code = {"offset": flat.mean().view(1)} if self.center else {}
        if self.center:
            flat = flat - code["offset"]
        absmax = block_absmax(flat, self.block_size)
        scaled = scale_blocks(flat.clone(), 1.0 / absmax.clamp(min=1e-38), self.block_size).clamp_(-1, 1)
        if self.grid is not None:
            scaled = self._gridded(scaled)
        codes = torch.bucketize(scaled, MIDPOINTS[self.signed].to(W.device), out_int32=True).to(torch.uint8)
        if self.grid is not None:
            codes = codes * (absmax > 0).repeat_interleave(self.block_size)[: codes.numel()]
        return {"codes": codes.view(W.shape), "absmax": absmax, **code}

    def decode(self, code: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        flat = lookup(code["codes"].view(-1), MAPS[self.signed][:, None])
        flat = scale_blocks(flat, code["absmax"].float(), self.block_size)
        return (flat + code["offset"].float() if self.center else flat).view(shape)

    def bits(self, shape: tuple[int, ...]) -> float:
        count = math.prod(shape)
        return 8 + 32 * (blocks(count, self.block_size) + self.center) / count

    def _gridded(self, scaled: Tensor) -> Tensor:
        """Each value rounded to the grid as the CPU kernel does: a fused multiply-add, truncated, and back in fp32."""
        assert self.grid is not None
        last = self.grid - 1
        step = ((scaled + 1.0) * 0.5).double().mul_(last).add_(0.5).float().to(torch.int32)
        return (step * 2).float().div_(last).sub_(1.0)
