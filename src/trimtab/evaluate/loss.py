"""Held-out measures of a model: loss and perplexity, accuracy, or correlation; no logits are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from trimtab.core.modes import evaluating
from trimtab.data.batches import batches, collate
from trimtab.data.encoded import Encoded
from trimtab.engine.loss import Batch, loss_sum, on, terms_of
from trimtab.engine.ranks import ALONE, Ranks


@torch.no_grad()
def evaluate(
    model: nn.Module,
    rows: Sequence[Encoded],
    task: str,
    pad_id: int,
    *,
    batch_size: int = 8,
    together: Callable[[Sequence[Encoded]], Batch] | None = None,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Held-out measures over all rows; no logits are kept.

    `together` makes one batch of some rows, by default a padded one; packed rows want a model inside
    `trimtab.engine.faster.running`. Of several `ranks` each measures its part, and all get the whole.
    causal and seq2seq: loss per trained token and perplexity; classify: loss per row and accuracy; regress: mean
    squared error and Pearson correlation.
    """
    device = next(model.parameters()).device
    together = together or partial(collate, pad_id=pad_id)
    with evaluating(model):
        total, terms, right = 0.0, 0, 0
        pairs: list[tuple[float, float]] = []
        done = 0
        groups = batches(rows, batch_size, 0, 0, shuffle=False, by_length=True)
        for at in range(0, len(groups), ranks.size):
            group = groups[min(at + ranks.rank, len(groups) - 1)]  # all run as many: sharded weights need all of them
            chosen = [rows[index] for index in group]
            batch = on(together(chosen), device)
            summed, outputs = loss_sum(model, batch, task)
            if at + ranks.rank >= len(groups):
                continue
            total += float(summed)
            terms += terms_of(batch)
            if task == "classify":
                labels = torch.tensor([one.label for one in chosen], device=device)
                right += int((outputs.argmax(-1) == labels).sum())
            elif task == "regress":
                pairs += zip(outputs.tolist(), (float(one.label or 0) for one in chosen), strict=True)
            done += len(group)
            if progress is not None:
                progress(done, len(rows))
    total, terms, right = ranks.total(total), ranks.total(terms), ranks.total(right)
    pairs = [(x, y) for x, y in ranks.listed(pairs)]
    loss = total / max(1, terms)
    if task in ("causal", "seq2seq"):
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": terms}
    if task == "regress":
        return {"loss": loss, "pearson": pearson(pairs), "rows": terms}
    return {"loss": loss, "accuracy": right / max(1, terms), "rows": terms}


def pearson(pairs: Sequence[tuple[float, float]]) -> float:
    """Pearson correlation of (prediction, target) pairs; 0 where one side does not vary."""
    x, y = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    x, y = x - x.mean(), y - y.mean()
    norm = float(x.norm() * y.norm())
    return float(x @ y) / norm if norm else 0.0
