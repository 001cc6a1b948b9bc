"""LowRank: what every method of the form W' = W + B A has in common, so that each states its two factors only."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import UserError, listing
from trimtab.core.frozen import low_rank_product
from trimtab.core.method import WeightMethod, dropout
from trimtab.core.site import Base, Site


@dataclass(frozen=True)
class LowRank(WeightMethod):
    """Abstract: W' = W + B A with (B, A) = factors(p, shape), applied as W x + B (A x) and never built in a forward."""

    def __post_init__(self) -> None:
        rank, alpha, rate = (
            getattr(self, name, usual) for name, usual in (("rank", 1), ("alpha", 1.0), ("dropout", 0.0))
        )
        problems = [f"rank={rank!r} is not a whole number from 1 on"] if rank < 1 or rank != int(rank) else []
        if alpha <= 0:
            problems.append(f"alpha={alpha!r} is not above 0")
        if not 0 <= rate <= 1:
            problems.append(f"dropout={rate!r} is not between 0 and 1")
        if problems:
            raise UserError(
                f"{type(self).__name__}: {listing(problems)}", fix="for example rank=8, alpha=16, dropout=0"
            )

    @abstractmethod
    def factors(self, p: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """B (out, k) and A (k, in) for a weight of shape (out, in), every scale included."""

    def weight(self, W: Tensor, p: Any) -> Tensor:
        B, A = self.factors(p, W.shape)
        return W + B @ A

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        B, A = self.factors(p, base.shape)
        rate = getattr(self, "dropout", 0.0)
        if rate and p.training:
            return base(x) + base.affine(dropout(x, rate, p), A) @ B.mT
        return low_rank_product(x, base, A, B)

    def added(self, p: Any, shape: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        """The factors; not while dropout or a forward of a method's own is at work in training."""
        trains = p.training and (getattr(self, "dropout", 0.0) or type(self).forward is not LowRank.forward)
        return None if trains else self.factors(p, shape)

    def row_norm(self, base: Base, p: Any) -> Tensor:
        """‖W + BA‖ per row = √(‖W‖² + Σ (2·W Aᵀ + B(AAᵀ))∘B), without the (out, in) sum."""
        B, A = self.factors(p, base.shape)
        W = base.weight
        norm = torch.linalg.vector_norm(W, dim=1)
        wide = norm if norm.element_size() > 2 else norm.float()
        return (wide.square() + ((2 * (W @ A.mT) + B @ (A @ A.mT)) * B).sum(1)).clamp(min=0).sqrt()


def key_of(site: Site) -> int:
    """A number for a site that depends on its name only, by which it finds its row of what all sites share."""
    return int.from_bytes(hashlib.sha256(site.name.encode()).digest()[:8], "little") >> 1


def pattern(text: str) -> list[tuple[str, float]]:
    """Settings by site: "q=16, *.mlp.*=4" -> [("q", 16.0), ("*.mlp.*", 4.0)]; what cannot be read is an error."""
    found, wrong = [], []
    for item in filter(None, (part.strip() for part in text.split(","))):
        glob, _, value = item.rpartition("=")
        try:
            found.append((glob.strip(), float(value)))
        except ValueError:
            wrong.append(item)
        if not glob.strip() or (found and found[-1][1] <= 0):
            wrong.append(item)
    if wrong:
        raise UserError(f"a pattern by site cannot read {listing(wrong)}", fix='like "q=16, *.mlp.*=4"')
    return found


def matches(glob: str, site: Site) -> bool:
    """Whether a glob means a site: by its role, its whole name, or the end of its name."""
    return glob == site.role or fnmatchcase(site.name, glob) or fnmatchcase(site.name, f"*.{glob}")


def by_site(text: str, site: Site, default: float) -> float:
    """The value of the first pattern that means this site, or the default."""
    return next((value for glob, value in pattern(text) if matches(glob, site)), default)


def unmatched(text: str, sites: Sequence[Site]) -> list[str]:
    """Globs of a pattern that mean none of these sites."""
    return [glob for glob, _ in pattern(text) if not any(matches(glob, site) for site in sites)]
