"""What APOLLO and APOLLO-Mini share: moments of a randomly projected gradient, and the limit on a step's growth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.core.transform import State, counter, size, tick, zeros
from trimtab.optim import _sides as sides

COUNTED = 20
"""Bytes of t and the seed, int64, and the last step's norm, fp32."""
GROWTH = 1.01
TINY = 1e-8


def begin(p: Tensor, rank: int) -> State:
    """Moments of the projected gradient, a seed for the projections, the norm of the last step."""
    shape = sides.reduced(p.shape, rank) if sides.projects(p.shape, rank) else tuple(p.shape)
    seed = torch.randint(2**31, (), dtype=torch.int64, device="cpu")
    last = torch.zeros((), dtype=torch.float32, device="cpu")
    return {"t": counter(), "seed": seed, "last": last, "m": zeros(p, *shape), "v": zeros(p, *shape)}


def projection(s: State, side: int, rank: int, gap: int, like: Tensor) -> Tensor:
    """P ~ N(0, 1/rank) of (side, rank), drawn from the seed and the number of whole gaps so far: it is never stored."""
    draw = torch.Generator(like.device).manual_seed(int(s["seed"]) + int(s["t"]) // gap)
    P = torch.randn(side, rank, generator=draw, device=like.device, dtype=torch.float32)
    return P.to(like.dtype) / rank**0.5


def moments(R: Tensor, s: State, beta1: float, beta2: float, epsilon: float) -> tuple[Tensor, float]:
    """m / (√v + ε) of a gradient, not corrected for the start, and the factor that corrects it."""
    t = tick(s)
    m, v = s["m"].lerp_(R, 1 - beta1), s["v"].mul_(beta2).addcmul_(R, R, value=1 - beta2)
    return m / (torch.sqrt(v).add_(epsilon)), (1 - beta2**t) ** 0.5 / (1 - beta1**t)


def limited(u: Tensor, s: State) -> Tensor:
    """u, made shorter where it is more than 1.01 times as long as the last one was."""
    norm = torch.linalg.vector_norm(u)
    if int(s["t"]) > 1:
        limit = (norm / (s["last"].to(norm) + TINY)).clamp(min=GROWTH) / GROWTH
        u, norm = u / limit, norm / limit
    s["last"].copy_(norm)
    return u


def held(shape: Sequence[int], rank: int) -> int:
    """Bytes of all of it."""
    return 8 * size(sides.reduced(shape, rank) if sides.projects(shape, rank) else shape) + COUNTED
