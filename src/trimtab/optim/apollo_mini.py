"""APOLLO-Mini: a learning rate per matrix, from moments of one random direction."""

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
class APOLLOMini(Transform):
    """u = √scale·s·G, with one s = ‖R̃‖ / ‖R‖ for the matrix, R̃ = Adam(R) and R = P G, P ~ N(0, 1) of one direction.

    The step is the gradient itself, as long as Adam would have made it in the direction that is looked at; √scale makes
    up for looking at one only. P is drawn anew every `gap` steps; the growth of a step is limited as in `APOLLO`.
    Tensors that are no matrices take Adam's step.
    State of an (m, n) matrix with m ≤ n: m and v of n values in fp32, 8·n bytes, and 20 for t, the seed and the last
    norm. Costs drawing P and m·n multiplications per step: about what SGD needs.
    arXiv 2412.05270.
    """

    paper: ClassVar[str] = "2412.05270"

    gap: int = 200
    scale: float = 128.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        within(self, "gap", 1, float("inf"))
        within(self, "beta1", 0, 1)
        within(self, "beta2", 0, 1)

    def init(self, p: Tensor) -> State:
        return channels.begin(p, 1)

    def update(self, g: Tensor, s: State, p: Tensor) -> Tensor:
        R, projected = g, sides.projects(g.shape, 1)
        if projected:
            R = sides.project(g, channels.projection(s, min(g.shape), 1, self.gap, g))
        step, correction = channels.moments(R, s, self.beta1, self.beta2, self.epsilon)
        if not projected:
            return step.mul_(correction)
        length = torch.linalg.vector_norm(step) / (torch.linalg.vector_norm(R) + channels.TINY)
        return channels.limited(g * length, s) * (self.scale**0.5 * correction)

    def state_bytes(self, shape: Sequence[int]) -> int:
        return channels.held(shape, 1)
