"""Loss of a model on encoded rows, summed over what is trained, and held-out measures made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.batch import prompts
from trimtab.data.batches import IGNORED, batches, collate
from trimtab.data.encode import Encoded


def loss_sum(model: nn.Module, batch: dict[str, Tensor], task: str) -> tuple[Tensor, Tensor]:
    """(summed loss, outputs) of one batch; divide by the number of trained terms of the whole step.

    causal: -Σ log p(token | before) over trained tokens, outputs (terms, vocabulary); classify: -Σ log p(class),
    outputs (rows, classes); regress: Σ (y − ŷ)², outputs (rows,).
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels = batch["labels"]
    if task == "causal":
        keep = labels[:, 1:] != IGNORED
        keep = F.pad(keep, (0, 1))
        with prompts(model, labels), only_positions(model, keep) as picked:
            logits = model(**inputs, use_cache=False).logits
        logits = logits if picked else logits[keep]
        return F.cross_entropy(logits.float(), labels[:, 1:][keep[:, :-1]], reduction="sum"), logits
    logits = model(**inputs).logits
    if task == "regress":
        values = logits.squeeze(-1).float()
        return F.mse_loss(values, labels.float(), reduction="sum"), values
    return F.cross_entropy(logits.float(), labels, reduction="sum"), logits


@contextmanager
def only_positions(model: nn.Module, keep: Tensor) -> Iterator[bool]:
    """Let only the kept positions (rows, positions) reach the output matrix: logits come as (kept, vocabulary).

    Yields False where the model names no output matrix; then logits come whole.
    """
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if head is None:
        yield False
        return
    handle = head.register_forward_pre_hook(lambda module, args: (args[0][keep], *args[1:]))
    try:
        yield True
    finally:
        handle.remove()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    rows: Sequence[Encoded],
    task: str,
    pad_id: int,
    *,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Held-out measures over all rows; no logits are kept.

    causal: loss per trained token and perplexity; classify: loss per row and accuracy; regress: mean squared error and
    Pearson correlation.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total, terms, right = 0.0, 0, 0
    pairs: list[tuple[float, float]] = []
    done = 0
    for group in batches(rows, batch_size, 0, 0, shuffle=False, by_length=True):
        batch = {key: value.to(device) for key, value in collate([rows[index] for index in group], pad_id).items()}
        summed, outputs = loss_sum(model, batch, task)
        total += float(summed)
        terms += len(outputs)
        if task == "classify":
            right += int((outputs.argmax(-1) == batch["labels"]).sum())
        elif task == "regress":
            pairs += zip(outputs.tolist(), batch["labels"].tolist(), strict=True)
        done += len(group)
        if progress is not None:
            progress(done, len(rows))
    model.train(training)
    loss = total / max(1, terms)
    if task == "causal":
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
