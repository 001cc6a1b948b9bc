"""The loss of every row by itself: what a comparison of two models over the same rows is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.modes import evaluating
from trimtab.core.stack import prompts
from trimtab.data.batches import IGNORED, batches, collate
from trimtab.data.encoded import Encoded
from trimtab.engine.loss import only_positions


@dataclass(frozen=True)
class RowScores:
    """Of each row, in the order given: its summed loss, over how many terms, and whether its class was right."""

    losses: list[float]
    terms: list[int]
    right: list[float] | None = None
    """1 or 0 for a classifier, else None."""

    @property
    def loss(self) -> float:
        """Loss per term over all rows."""
        return sum(self.losses) / max(1, sum(self.terms))

    @property
    def accuracy(self) -> float | None:
        """Share of rows whose class was right."""
        return None if self.right is None else sum(self.right) / len(self.right)


@torch.no_grad()
def each_row(
    model: nn.Module,
    rows: Sequence[Encoded],
    task: str,
    pad_id: int,
    *,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> RowScores:
    """The scores of every row, in padded batches of like length; no logits are kept.

    causal and seq2seq: Σ −log p(token) over the row's trained tokens; classify: −log p(class); regress: (y − ŷ)².
    """
    device = next(model.parameters()).device
    with evaluating(model):
        losses, terms, right = [0.0] * len(rows), [0] * len(rows), [0.0] * len(rows)
        done = 0
        for group in batches(rows, batch_size, 0, 0, shuffle=False, by_length=True):
            batch = {key: value.to(device) for key, value in collate([rows[index] for index in group], pad_id).items()}
            inputs, labels = {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
            if task in ("causal", "seq2seq"):
                summed, counts = token_losses(model, inputs, labels)
            else:
                summed, hit = labelled(model(**inputs).logits, labels, task)
                counts = torch.ones_like(summed, dtype=torch.long)
            for place, index in enumerate(group):
                losses[index], terms[index] = float(summed[place]), int(counts[place])
                if task == "classify":
                    right[index] = float(hit[place])
            done += len(group)
            if progress is not None:
                progress(done, len(rows))
    return RowScores(losses, terms, right if task == "classify" else None)


def token_losses(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """(summed loss, trained tokens) of each row of a padded batch."""
    keep = F.pad(labels[:, 1:] != IGNORED, (0, 1))
    with prompts(model, labels), only_positions(model, keep) as picked:
        logits = model(**inputs, use_cache=False).logits
    logits = logits if picked else logits[keep]
    each = F.cross_entropy(logits.float(), labels[:, 1:][keep[:, :-1]], reduction="none")
    row = keep.nonzero()[:, 0]
    return each.new_zeros(len(labels)).index_add_(0, row, each), keep.sum(1)


def labelled(logits: Tensor, labels: Tensor, task: str) -> tuple[Tensor, Tensor]:
    """(loss, whether the class is right) of each row."""
    if task == "regress":
        losses = (logits.squeeze(-1).float() - labels.float()) ** 2
        return losses, torch.zeros_like(losses)
    return F.cross_entropy(logits.float(), labels, reduction="none"), (logits.argmax(-1) == labels).float()
