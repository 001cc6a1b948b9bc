"""How one answer chooses its tokens: greedily, or drawn from the likeliest ones with a generator of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Settings of one answer. `temperature` 0 is greedy; `logprobs` None reports none, else so many others beside."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None


@dataclass(frozen=True)
class Choice:
    """A chosen token, with its log-probability and the likeliest tokens' where they are asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Chooser:
    """Chooses the tokens of one answer: the same ones for the same seed, whatever else is in the batch."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)

    def choose(self, logits: Tensor) -> Choice:
        """The next token from its logits (vocabulary).

        Drawn from softmax(logits / temperature), cut to the fewest tokens whose probabilities reach top_p.
        Log-probabilities are those of the model itself, at temperature 1. Errors: ValueError on logits that are NaN.
        """
        wide = logits.float().cpu()
        if bool(wide.isnan().any()):
            raise ValueError("the model's logits are not numbers")
        token = int(logits.argmax(-1)) if self.sampling.temperature == 0 else self.draw(wide)
        if self.sampling.logprobs is None:
            return Choice(token)
        logs = torch.log_softmax(wide, -1)
        values, ids = logs.topk(min(self.sampling.logprobs, len(logs)))
        return Choice(token, float(logs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))

    def draw(self, wide: Tensor) -> int:
        """A token by its probability, among those that top_p leaves."""
        # the largest logit becomes 0 first, so that no small temperature makes it infinite
        weights = torch.softmax((wide - wide.max()) / self.sampling.temperature, -1)
        if self.sampling.top_p < 1:
            ordered, ids = weights.sort(descending=True, stable=True)
            beyond = ordered.cumsum(-1) - ordered >= self.sampling.top_p
            beyond[0] = False  # top_p 0 leaves the likeliest one
            ordered[beyond] = 0
            return int(ids[torch.multinomial(ordered, 1, generator=self.generator)])
        return int(torch.multinomial(weights, 1, generator=self.generator))
