"""Starts: what the factors of a LoRA begin with, and what is taken out of the frozen weight for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.registry import find, names
from trimtab.core.site import Site

LETTERS = {"A": "init_a", "B": "init_b"}
"""The two starts of the LoRA paper, by the factor that is drawn."""


class Factors(NamedTuple):
    """A (rank, in) and B (out, rank) at step 0; A0 and B0 where another product than theirs is taken out of W."""

    A: Tensor
    B: Tensor
    A0: Tensor | None = None
    B0: Tensor | None = None


@dataclass(frozen=True)
class Start(ABC):
    """Abstract base of starts: W' = W + s·(B A − B0 A0), where A and B train and begin as `factors` says.

    With `takes_out`, A0 and B0 are fixed and W0 = W − s·B0 A0 is what stays frozen. A dense W keeps its bits: the
    product is taken out in the forward. A weight that is about to be quantized is encoded without it.
    """

    paper: ClassVar[str] = ""
    statistics: ClassVar[str | None] = None
    """What must be measured on the model first, as `Method.statistics`."""
    takes_out: ClassVar[bool] = True
    """Whether a product is taken out of W; otherwise B A is zero at step 0."""
    needs_format: ClassVar[bool] = False
    """Whether it only makes sense on a weight that is about to be quantized."""
    rate: ClassVar[float] = 1.0
    """Factor on LoRA's default learning rate."""
    laws: ClassVar[Mapping[str, str]] = {}
    """Laws that a LoRA with this start does not obey, each with the reason."""

    def __post_init__(self) -> None:
        rounds, iterations = getattr(self, "rounds", 1), getattr(self, "iterations", None)
        if rounds < 1 or (iterations is not None and iterations < 0):
            raise UserError(
                f"{type(self).__name__}: rounds={rounds!r}, iterations={iterations!r}",
                fix="rounds of 1 or more, iterations of 0 or more, or None for the whole decomposition",
            )

    @abstractmethod
    def factors(self, site: Site, rank: int, scale: float) -> Factors:
        """The tensors at one site; `scale` is s."""

    @property
    def elastic(self) -> bool:
        """Whether `budget` gives the ranks out over all sites."""
        return False

    def budget(self, sites: Sequence[Site], rank: int) -> Tensor | None:
        """Ranks (sites), `rank` in the mean, or None: every site gets the same."""
        return None

    def begin(self, site: Site, rank: int, scale: float) -> dict[str, Any]:
        """What `init` of a method returns: A and B, and the fixed A0 and B0."""
        (out, into), name = site.base.shape, type(self).__name__
        if torch.empty(0).is_meta:
            found = Factors(torch.empty(rank, into), torch.empty(out, rank))
        elif self.takes_out and rank > min(out, into):
            raise UserError(f"{name}: rank={rank} at {site.name}, a matrix of {out} x {into}", fix="a smaller rank")
        elif self.needs_format and site.format is None:
            raise UserError(
                f"{name} starts from what quantizing loses, and {site.name} is not about to be quantized",
                fix="trimtab tune --quantize nf4, or attach(..., quantize=NF4()) on the dense model",
            )
        else:
            found = self.factors(site, rank, scale)
        p: dict[str, Any] = {"A": nn.Parameter(found.A.contiguous()), "B": nn.Parameter(found.B.contiguous())}
        if not self.takes_out:
            return p
        A0, B0 = (found.A, found.B) if found.A0 is None or found.B0 is None else (found.A0, found.B0)
        return p | {"A0": A0.clone().contiguous(), "B0": B0.clone().contiguous()}


def named(start: str | Start) -> Start:
    """The start that a setting means: itself, "A", "B", or a registered name."""
    if isinstance(start, Start):
        return start
    try:
        made: Start = find(LETTERS.get(start, start), "start")()
    except UserError:
        letters = [letter for letter, name in LETTERS.items() if name in names("start")]
        known = [*letters, *(name for name in names("start") if name not in LETTERS.values())]
        raise UserError(f"start={start!r} names no factor and no start", fix=f"one of {', '.join(known)}") from None
    return made


def wide_weight(site: Site) -> Tensor:
    """W (out, in) of a site in fp32 at least; decompositions in a narrow type lose what they look for."""
    W = site.base.weight.detach()
    return W if W.dtype == torch.float64 else W.float()


def balanced(U: Tensor, S: Tensor, Vt: Tensor, scale: float) -> Factors:
    """A = √(S/s) Vᵀ and B = U √(S/s), so that s·B A = U S Vᵀ and both factors are of one size."""
    root = (S / scale).sqrt()
    return Factors(root[:, None] * Vt, U * root)
