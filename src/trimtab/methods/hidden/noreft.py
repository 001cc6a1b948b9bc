"""NoReFT: LoReFT without the orthonormal rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.positions import PromptEdit
from trimtab.core.site import Site


@dataclass(frozen=True)
class NoReFT(PromptEdit):
    """h ← h + W2ᵀ(W1 h + b − W2 h) at the first `first` and last `last` tokens of the prompt, after every block.

    The same as LoReFT with a free W2 in place of R. W1 and W2 (rank, width) and b (rank) start as linear layers', so
    the first output is not the frozen one. With n prompt tokens at most ⌊n/2⌋ first and ⌈n/2⌉ last ones are edited;
    generated tokens never are. Costs 2·rank·width multiplications per token in prefill, none in decoding. Not
    mergeable.
    arXiv 2404.03592, ablation in the appendix. The official code can add a second bias after W2 h, drops out the whole
    output and prepends a pad token; none of this is done here.
    """

    paper: ClassVar[str] = "2404.03592"

    def init(self, site: Site) -> dict[str, Any]:
        source, target = nn.Linear(site.out_features, self.rank), nn.Linear(site.out_features, self.rank, bias=False)
        return {"W1": source.weight, "b": source.bias, "W2": target.weight}

    def count(self, site: Site) -> int:
        return 2 * self.rank * site.out_features + self.rank

    def edit(self, h: Tensor, p: Any) -> Tensor:
        return F.linear(h, p.W1 - p.W2, p.b) @ p.W2
