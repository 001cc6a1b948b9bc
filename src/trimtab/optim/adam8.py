"""Adam8: Adam with its moments in eight bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.core.format import Format
from trimtab.core.registry import find
from trimtab.core.transform import COUNTER, State, Transform, counter, size, tick, within, zeros

ZERO = 127
"""The code of 0 in the signed map; what is below it decodes to negative numbers."""


@dataclass(frozen=True)
class Adam8(Transform):
    """u = m̂ / (√v̂ + ε), Adam, with m = D⁺⁻[codes]·absmax and v = D⁺[codes]·absmax decoded before and encoded after.

    D are the dynamic maps (`Dynamic8`), absmax the largest magnitude of a block of 256 values, taken anew at every
    step. u is made of the new moments before they are rounded. An m that would round across 0 takes the next code on
    its own side. Where g is not finite both moments become 0 and the value stays.
    State: codes in uint8 and absmax in fp32 of m and v: 2 + 8/256 bytes per value, 8 for t. Tensors of fewer than
    `smallest` values keep fp32 moments, 8 bytes per value. Costs a decoding and an encoding of both per step.
    arXiv 2110.02861. Codes are bitsandbytes' (its GPU kernels'; the CPU one rounds to a grid first). Its kernels decay
    the weight after the step, here as in torch before it.
    """

    paper: ClassVar[str] = "2110.02861"

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    block_size: int = 256
    smallest: int = 4096

    def __post_init__(self) -> None:
        within(self, "beta1", 0, 1)
        within(self, "beta2", 0, 1)
        within(self, "block_size", 1, float("inf"))

    def init(self, p: Tensor) -> State:
        if p.numel() < self.smallest:
            return {"t": counter(), "m": zeros(p), "v": zeros(p)}
        codes = torch.zeros(p.shape, dtype=torch.uint8, device=p.device)
        absmax = torch.zeros(self.blocks(p.numel()), dtype=torch.float32, device=p.device)
        first, second = {"codes": codes + ZERO, "absmax": absmax}, {"codes": codes, "absmax": absmax.clone()}
        return {"t": counter(), "m": first, "v": second}

    def update(self, g: Tensor, s: State, p: Tensor) -> Tensor:
        t, coded = tick(s), p.numel() >= self.smallest
        m, v = s["m"], s["v"]
        if coded:
            signed, unsigned = formats(self.block_size)
            m, v = signed.decode(m, g.shape).to(g.dtype), unsigned.decode(v, g.shape).to(g.dtype)
        m.mul_(self.beta1).add_(g, alpha=1 - self.beta1)
        v.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
        if not bool(torch.isfinite(g.sum())):
            bad = ~torch.isfinite(g)
            m.masked_fill_(bad, 0), v.masked_fill_(bad, 0)
        root = torch.sqrt(v).div_((1 - self.beta2**t) ** 0.5).add_(self.epsilon)
        if coded:
            keep(s["v"], unsigned.encode(v))
            new = signed.encode(m)
            keep(s["m"], new | {"codes": new["codes"] - ((new["codes"] == ZERO) & torch.signbit(m)).to(torch.uint8)})
        return (m / (1 - self.beta1**t)).div_(root)

    def state_bytes(self, shape: Sequence[int]) -> int:
        count = size(shape)
        return (8 * count if count < self.smallest else 2 * count + 8 * self.blocks(count)) + COUNTER

    def blocks(self, count: int) -> int:
        return -(-count // self.block_size)


@cache
def formats(block_size: int) -> tuple[Format, Format]:
    """What m and v are kept in."""
    dynamic = find("dynamic8", "storage")
    return dynamic(block_size=block_size), dynamic(block_size=block_size, signed=False)


def keep(kept: State, new: State) -> None:
    """Put new codes in the place of the old."""
    for key, value in new.items():
        kept[key].copy_(value)
