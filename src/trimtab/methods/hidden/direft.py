"""DiReFT: an edit of the residual stream by two free low-rank factors, at chosen prompt positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.positions import PromptEdit
from trimtab.core.site import Site


@dataclass(frozen=True)
class DiReFT(PromptEdit):
    """h ← h + W2ᵀ(W1 h + b) at the first `first` and last `last` tokens of the prompt, after every block.

    LoRA on the residual stream: W1 and W2 (rank, width) and b (rank) start as linear layers', so the first output is
    not the frozen one. With n prompt tokens at most ⌊n/2⌋ first and ⌈n/2⌉ last ones are edited; generated tokens never
    are. Costs 2·rank·width multiplications per token in prefill, none in decoding. Not mergeable.
    arXiv 2404.03592, section 3.2. The official code calls this NodireftIntervention (its Direft keeps the rows
    orthonormal), drops out the whole output and prepends a pad token; neither of these two is done here.
    """

    paper: ClassVar[str] = "2404.03592"

    def init(self, site: Site) -> dict[str, Any]:
        source, target = nn.Linear(site.out_features, self.rank), nn.Linear(site.out_features, self.rank, bias=False)
        return {"W1": source.weight, "b": source.bias, "W2": target.weight}

    def count(self, site: Site) -> int:
        return 2 * self.rank * site.out_features + self.rank

    def edit(self, h: Tensor, p: Any) -> Tensor:
        return F.linear(h, p.W1, p.b) @ p.W2
