"""Rows: which output rows of a fused weight one of its parts is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """[start, stop) of each of `groups` runs that a weight's output rows divide into: one range, or some of every head.

    In the order of the weight, which is that of a projection of its own: heads one after another.
    """

    start: int
    stop: int
    groups: int = 1

    def __len__(self) -> int:
        return self.groups * (self.stop - self.start)

    def of(self, whole: Tensor, dim: int = -1) -> Tensor:
        """These rows of a tensor that has all of them along `dim`; a view where they are one range, else a copy."""
        mine = self._runs(whole, dim).narrow(dim % whole.ndim + 1, self.start, self.stop - self.start)
        return mine.flatten(dim % whole.ndim, dim % whole.ndim + 1)

    def put(self, whole: Tensor, part: Tensor, dim: int = -1) -> Tensor:
        """`whole` with `part` in place of these rows, out of place."""
        runs, mine, along = self._runs(whole, dim), self._runs(part, dim), dim % whole.ndim + 1
        before, after = runs.narrow(along, 0, self.start), runs.narrow(along, self.stop, runs.shape[along] - self.stop)
        return torch.cat([one for one in (before, mine, after) if one.shape[along]], along).flatten(along - 1, along)

    def among(self, part: Tensor, out: int, dim: int = -1) -> Tensor:
        """`part` at these of `out` rows, zeros at the others."""
        shape = list(part.shape)
        shape[dim] = out
        return self.put(part.new_zeros(shape), part, dim)

    def _runs(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor.unflatten(dim, (self.groups, tensor.shape[dim] // self.groups))
