"""Embedding rows: train the vectors of a few tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError, listing
from trimtab.core.method import WeightMethod
from trimtab.core.site import Base, Site


@dataclass(frozen=True)
class EmbeddingRows(WeightMethod):
    """W' = W but for W'[:, t] = V_t at the chosen tokens t; W (width, vocabulary) is the embedding, read by columns.

    `tokens` are ids and ranges as in Python, "5, 100:110, -8:"; by default the last 8, where new tokens stand. `index`
    (k) holds their ids in order, V (k, width) their vectors, which start as copies of the rows. V holds the vectors
    themselves, no offsets: what a resized model drew for new tokens is in the file. Trains k·width values and costs one
    look-up more per token. Mergeable.
    PEFT calls it trainable tokens. A tied output head keeps its frozen rows; train it as a part of its own.
    """

    where: ClassVar[str] = "embed"
    hosts: ClassVar[frozenset[str]] = frozenset({"embedding"})
    learning_rate: ClassVar[float] = 1e-2
    """Few rows, each with a gradient only when its token occurs: far above what a whole matrix takes."""

    tokens: str = "-8:"

    def __post_init__(self) -> None:
        self.ids(1)

    def ids(self, size: int) -> list[int]:
        """The chosen ids of a vocabulary, in order, each once; not checked against it."""
        found: set[int] = set()
        wrong = []
        for term in filter(None, (part.strip() for part in self.tokens.split(","))):
            try:
                ends = [int(piece) if piece.strip() else None for piece in term.split(":")]
            except ValueError:
                ends = []
            if len(ends) == 1 and ends[0] is not None:
                found.add(ends[0] + size * (ends[0] < 0))
            elif len(ends) == 2:
                found.update(range(*slice(*ends).indices(size)))
            else:
                wrong.append(term)
        if wrong or not self.tokens.strip(", "):
            raise UserError(
                f"EmbeddingRows: tokens={self.tokens!r} cannot be read", fix='ids and ranges, like "5, 100:110, -8:"'
            )
        return sorted(found)

    def chosen(self, site: Site) -> list[int]:
        """The ids at one site, all of them in its vocabulary."""
        size = site.in_features
        ids = self.ids(size)
        outside = [str(t) for t in ids if not 0 <= t < size]
        if outside or not ids:
            told = f"no token {listing(outside, 4)}" if outside else f"no token in {self.tokens!r}"
            raise UserError(f"EmbeddingRows: {site.name} has {told}: ids are 0 to {size - 1}")
        return ids

    def only_at(self, vocabulary: int) -> list[int]:
        return self.ids(vocabulary)

    def init(self, site: Site) -> dict[str, Any]:
        index = torch.tensor(self.chosen(site))
        V = site.base.weight.detach().mT[index.to(site.base.weight.device)]
        return {"index": index, "V": nn.Parameter(V.clone())}

    def count(self, site: Site) -> int:
        return len(self.chosen(site)) * site.out_features

    def weight(self, W: Tensor, p: Any) -> Tensor:
        return W.index_copy(1, p.index, p.V.mT.to(W.dtype))

    def forward(self, x: Tensor, base: Base, p: Any) -> Tensor:
        at = torch.searchsorted(p.index, x).clamp(max=len(p.index) - 1)
        return torch.where((p.index[at] == x)[..., None], base.affine(at, p.V.mT), base(x))
