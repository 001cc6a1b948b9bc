"""Prefix-layer tuning: the activations of prefix tokens, trained at every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from trimtab.core.activations import started, statistic_of
from trimtab.core.errors import UserError
from trimtab.core.method import InputMethod
from trimtab.core.site import Site


@dataclass(frozen=True)
class PreLayer(InputMethod):
    """h[:length] ← P after the embedding and after every block but the last, whose outputs nobody meets.

    What earlier layers make of the prefix is replaced by trained activations P (length, width), one for each layer,
    which start at N(0, 0.02²). With `start="rows"` they start as those of the first tokens of training rows, with
    `start="text"` as those of `text`: a causal model then computes at first what it does with that text in front.
    Adds `length` positions to every row. Not mergeable.
    arXiv 2106.09685 (PreLayer, a baseline of the LoRA paper). The paper's infix tokens between prompt and answer are
    left out.
    """

    paper: ClassVar[str] = "2106.09685"
    where: ClassVar[str] = "embed, block, !block@-1"
    hosts: ClassVar[frozenset[str]] = frozenset({"embedding", "opaque"})
    learning_rate: ClassVar[float] = 5e-3  # vectors from a small start, as a direct prefix

    length: int = 8
    start: str = "random"
    text: str = ""
    tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UserError(f"PreLayer: length={self.length}", fix="from 1 on")
        self.__dict__["statistics"] = statistic_of(self)

    @property
    def virtual_tokens(self) -> int:
        return self.length

    def init(self, site: Site) -> dict[str, Any]:
        return {"P": nn.Parameter(started(site, self.length))}

    def count(self, site: Site) -> int:
        return self.length * site.out_features

    def virtual(self, p: Any) -> Tensor:
        return p.P
