"""The loss of a batch, summed over its trained terms: only what is trained reaches the output matrix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.batch import prompts
from trimtab.data.batches import IGNORED, token_count
from trimtab.data.packing import Pack


def loss_sum(model: nn.Module, batch: dict[str, Tensor] | Pack, task: str) -> tuple[Tensor, Tensor]:
    """(summed loss, outputs) of one batch; divide by the number of trained terms of the whole step.

    causal: -Σ log p(token | before) over trained tokens, outputs (terms, vocabulary); classify: -Σ log p(class),
    outputs (rows, classes); regress: Σ (y − ŷ)², outputs (rows,). A pack is causal, and its model runs inside
    `trimtab.engine.attention.segments_in`.
    """
    if isinstance(batch, Pack):
        with only_positions(model, (0, batch.sources)) as picked:
            logits = model(
                input_ids=batch.ids, position_ids=batch.positions, segments=batch.segments, use_cache=False
            ).logits
        logits = logits if picked else logits[0, batch.sources]
        each = F.cross_entropy(logits.float(), batch.targets, reduction="none")
        return each @ batch.weights, logits
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels = batch["labels"]
    if task == "causal":
        keep = F.pad(labels[:, 1:] != IGNORED, (0, 1))
        with prompts(model, labels), only_positions(model, keep) as picked:
            logits = model(**inputs, use_cache=False).logits
        logits = logits if picked else logits[keep]
        return F.cross_entropy(logits.float(), labels[:, 1:][keep[:, :-1]], reduction="sum"), logits
    logits = model(**inputs).logits
    if task == "regress":
        values = logits.squeeze(-1).float()
        return F.mse_loss(values, labels.float(), reduction="sum"), values
    return F.cross_entropy(logits.float(), labels, reduction="sum"), logits


def terms_of(batch: dict[str, Tensor] | Pack) -> int:
    """How many terms the loss of a batch sums over."""
    return batch.terms if isinstance(batch, Pack) else token_count(batch)


def on(batch: dict[str, Tensor] | Pack, device: torch.device) -> dict[str, Tensor] | Pack:
    """The same batch on a device."""
    return batch.to(device) if isinstance(batch, Pack) else {key: value.to(device) for key, value in batch.items()}


@contextmanager
def only_positions(model: nn.Module, keep: Any) -> Iterator[bool]:
    """Let only the positions that `keep` indexes reach the output matrix: logits come as (kept, vocabulary).

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
