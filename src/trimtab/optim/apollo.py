"""APOLLO: a learning rate per channel, from moments of a random projection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.core.transform import State, Transform, within
from trimtab.optim import _channels as channels
from trimtab.optim import _sides as sides


@dataclass(frozen=True)
class APOLLO(Transform):
    """u = √scale·G∘s, with s_j = ‖R̃_j‖ / ‖R_j‖ for each channel j, R̃ = Adam(R) and R = P G, P ~ N(0, 1/rank).

    A channel is a slice along the larger side; the smaller side is projected. The step is the gradient itself, each
    channel as long as Adam would have made it. P is drawn anew every `gap` steps from a seed. A step may be at most
    1.01 times as long as the last one (Fira's limit, on G∘s before Adam's correction of its start, as in the official
    code). Tensors that are no matrices, or have a side below `rank`, take Adam's step.
    State of an (m, n) matrix with m ≤ n: m and v of (rank, n) in fp32, 8·rank·n bytes, and 20 for t, the seed and the
    last norm; P is not kept. Costs drawing P and m·n·rank multiplications per step; no SVD.
    arXiv 2412.05270. For fine-tuning its authors' recipes take rank 128 and scale 32. The official code keeps P.
    """

    paper: ClassVar[str] = "2412.05270"

    rank: int = 256
    gap: int = 200
    scale: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        sides.checked(self)
        within(self, "beta1", 0, 1)
        within(self, "beta2", 0, 1)

    def init(self, p: Tensor) -> State:
        return channels.begin(p, self.rank)

    def update(self, g: Tensor, s: State, p: Tensor) -> Tensor:
        R, projected = g, sides.projects(g.shape, self.rank)
        if projected:
            R = sides.project(g, channels.projection(s, min(g.shape), self.rank, self.gap, g))
        step, correction = channels.moments(R, s, self.beta1, self.beta2, self.epsilon)
        if not projected:
            return step.mul_(correction)
        along = 1 if g.shape[0] >= g.shape[1] else 0
        norms = [torch.linalg.vector_norm(one, dim=along, keepdim=True) for one in (step, R)]
        u = channels.limited(g * (norms[0] / (norms[1] + channels.TINY)), s)
        return u * (self.scale**0.5 * correction)

    def state_bytes(self, shape: Sequence[int]) -> int:
        return channels.held(shape, self.rank)
