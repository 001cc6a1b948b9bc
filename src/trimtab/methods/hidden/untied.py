"""Untied: a representation method with tensors of its own for the first and for the last tokens of the prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.method import HiddenMethod
from trimtab.core.positions import Ends, PromptEdit, prompt_ends
from trimtab.core.registry import find
from trimtab.core.site import Base, Site


@dataclass(frozen=True)
class Untied(HiddenMethod):
    """h ← h + edit(h; p) at the first tokens of the prompt, and h ← h + edit(h; q) at its last ones.

    `edit` is that of `inner`, by default LoReFT's; p and q are two sets of its tensors, (rank, width) and (rank), drawn
    one after the other, so they start unlike each other. After the last block nothing reads the first tokens of a
    prompt, so p does not train there. Trains twice as many values; costs what the inner method costs twice over in
    prefill, none in decoding. Not mergeable.
    arXiv 2404.03592, "untied" in its tables. The official code makes two interventions per block of it.
    """

    paper: ClassVar[str] = "2404.03592"
    where: ClassVar[str] = "block"
    learning_rate: ClassVar[float] = 2e-3
    reads_batch: ClassVar[bool] = True
    laws: ClassVar[dict[str, str]] = PromptEdit.laws

    inner: PromptEdit = field(default_factory=lambda: find("loreft")())

    def __post_init__(self) -> None:
        if 0 in (self.inner.first, self.inner.last):
            raise UserError(
                f"Untied: first={self.inner.first} and last={self.inner.last} leave one end of the prompt alone",
                fix=f"{type(self.inner).__name__} as it is, or both from 1 on",
            )

    @property
    def ends(self) -> tuple[Ends, ...]:
        """The ends of a prompt that are edited, each by itself."""
        return ((self.inner.first, 0), (0, self.inner.last))

    def init(self, site: Site) -> dict[str, Any]:
        return {"first": self.inner.init(site), "last": self.inner.init(site)}

    def count(self, site: Site) -> int:
        return 2 * self.inner.count(site)

    def rate(self, width: int) -> float:
        return self.inner.rate(width)

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        h = base(x)
        front = prompt_ends(h, base.batch, self.inner.first, 0)
        back = prompt_ends(h, base.batch, 0, self.inner.last)
        if front is None or back is None:
            return h
        return h + front * self.inner.edit(h, p.first) + back * self.inner.edit(h, p.last)
