"""AutoPrompt: a prompt of real tokens, found by search instead of training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import InputMethod
from trimtab.core.site import Site


@dataclass(frozen=True)
class AutoPrompt(InputMethod):
    """X ← [E[t]; X] with ids t; one id a step becomes the best of the `candidates` largest −∂L/∂e · E[v].

    The gradient ranks the vocabulary to first order, the exact loss of every candidate on other rows decides, and a
    step never takes a worse one (`trimtab.search_prompt`). t (length) starts as `tokens`, repeated, or is drawn; o
    (length, width) is added to E[t], stays zero in a search and receives ∂L/∂e. Costs `candidates` + 1 forwards a step;
    in use, adds `length` positions to every row. Not mergeable.
    arXiv 2010.15980. The trigger stands in front of the text; it may, but need not, survive decoding to text and back.
    """

    paper: ClassVar[str] = "2010.15980"
    where: ClassVar[str] = "embed"
    hosts: ClassVar[frozenset[str]] = frozenset({"embedding"})
    learning_rate: ClassVar[float] = 1e-2  # nothing is trained in a search
    own_rows: ClassVar[bool] = True

    length: int = 5
    candidates: int = 10
    text: str = ""
    tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.length < 1 or self.candidates < 1:
            problem = f"length={self.length}, candidates={self.candidates}"
            raise UserError(f"AutoPrompt: {problem}", fix="both from 1 on")

    @property
    def virtual_tokens(self) -> int:
        return self.length

    def init(self, site: Site) -> dict[str, Any]:
        size, width = site.in_features, site.out_features
        t, E = torch.zeros(self.length, dtype=torch.long), torch.empty(self.length, width)
        if not E.is_meta:
            if self.text and not self.tokens:
                raise UserError("AutoPrompt: the ids of its text are not known", fix="tokens=tokenizer(text).input_ids")
            known = torch.tensor(self.tokens or torch.randint(size, (self.length,)).tolist())
            t = known[torch.arange(self.length) % len(known)]
            if bool((t < 0).any()) or bool((t >= size).any()):
                raise UserError(f"AutoPrompt: {site.name} has {size} tokens, found {t.tolist()}")
            E = site.base(t).detach().to(E)
        return {"t": t, "E": E, "o": nn.Parameter(torch.zeros(self.length, width))}

    def count(self, site: Site) -> int:
        return self.length * site.out_features

    def virtual(self, p: Any) -> Tensor:
        return p.E + p.o

    def best(self, p: Any, W: Tensor, place: int, banned: Tensor) -> Tensor:
        """Ids that lower the loss most to first order at a place, by the gradient of `o`; W (width, vocabulary)."""
        score = p.o.grad[place].to(W) @ W
        score[banned] = float("inf")
        score[p.t[place]] = float("inf")
        found = score.topk(min(self.candidates, len(score)), largest=False)
        return found.indices[found.values.isfinite()]
