"""AdapterDrop: another method, left out of the lowest layers at random while it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.method import HiddenMethod
from trimtab.core.registry import find
from trimtab.core.site import Base, Site

NONE = 2**31
"""Layer of a site that is in none: never among the lowest."""


@dataclass(frozen=True)
class AdapterDrop(HiddenMethod):
    """h ← inner(h) in the layers from n on, h ← h below, with n drawn anew for each step of training from 0 … `most`.

    The inner method's tensors are as it makes them; beside them `layer` () and `dropped` () of a site are fixed, and
    `seed` () of all sites, from which with the step's number n follows. It starts at 0, so the first step trains every
    layer. What is dropped is not computed and gets no gradient, and below layer n nothing is kept for backward.
    Costs what the inner method costs, less what is dropped; not mergeable.
    arXiv 2010.11918, its robust training: afterwards `detach(model, where="attn@:5, ffn@:5")` prunes the first five
    layers for good. Its specialised training, with n fixed, is `where="attn@5:, ffn@5:"` without this. `most` is by
    default one less than there are layers. DistributedDataParallel wants `find_unused_parameters=True`.
    """

    paper: ClassVar[str] = "2010.11918"
    where: ClassVar[str] = "attn, ffn"
    learning_rate: ClassVar[float] = 1e-3
    laws: ClassVar[dict[str, str]] = {
        "merge": "the inner method has none",
        "identity": "the inner method is not",
        "compiles": "whether a site runs is read from a number that changes from step to step",
    }

    inner: HiddenMethod = field(default_factory=lambda: find("houlsby")())
    most: int | None = None

    def __post_init__(self) -> None:
        if self.inner.space != "hidden":
            raise UserError(
                f"AdapterDrop: {type(self.inner).__name__} does not edit activations", fix="inner=Houlsby()"
            )
        if self.most is not None and self.most < 0:
            raise UserError(f"AdapterDrop: most={self.most}", fix="0 or more, below the number of layers")
        for name in ("where", "hosts", "source"):
            self.__dict__[name] = getattr(self.inner, name)
        self.__dict__["reads_batch"] = getattr(self.inner, "reads_batch", False)
        self.__dict__["laws"] = {**self.inner.laws, "compiles": type(self).laws["compiles"]}

    def rate(self, width: int) -> float:
        return self.inner.rate(width)

    def shared(self, sites: Sequence[Site]) -> dict[str, Any]:
        deepest = max((site.layer for site in sites if site.layer is not None), default=0)
        most = torch.tensor(deepest if self.most is None else self.most)
        return {"seed": torch.randint(2**62, ()), "most": most, **self.inner.shared(sites)}

    def count_shared(self, sites: Sequence[Site]) -> int:
        return self.inner.count_shared(sites)

    def init(self, site: Site) -> dict[str, Any]:
        layer = torch.tensor(NONE if site.layer is None else site.layer)
        return {"layer": layer, "dropped": torch.tensor(0), "inner": self.inner.init(site)}

    def count(self, site: Site) -> int:
        return self.inner.count(site)

    def lowest(self, p: Any, step: int) -> int:
        """n of a step: the first layer that is not dropped."""
        draw = torch.Generator().manual_seed((int(p.shared.seed) + step) % 2**63)
        return int(torch.randint(int(p.shared.most) + 1, (), generator=draw, device="cpu"))

    def on_step(self, p: Any, step: int) -> None:
        p.dropped.fill_(int(p.layer < self.lowest(p, step + 1)))
        self.inner.on_step(p.inner, step)

    def stale(self, p: Any, step: int) -> Sequence[Tensor]:
        return self.inner.stale(p.inner, step)

    def penalty(self, p: Any) -> Tensor | None:
        return self.inner.penalty(p.inner)

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        return base(x) if p.training and bool(p.dropped) else self.inner.forward(x, base, p.inner)
