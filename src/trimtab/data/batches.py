"""Batches of encoded sequences: which ones go together, and the padded tensors of each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.data.encoded import Encoded

IGNORED = -100
"""The label of a position that is not trained: what torch's cross entropy ignores."""

WINDOW = 50
"""Batches' worth of sequences sorted by length together."""


def collate(
    encoded: Sequence[Encoded], pad_id: int, *, pad_to_multiple: int = 1, side: Literal["right", "left"] = "right"
) -> dict[str, Tensor]:
    """Pad sequences to one length and stack them.

    `input_ids` and `attention_mask` (rows, length), int64; `token_type_ids` alike where the sequences have segments.
    Sequences with a `source` make `input_ids` and `attention_mask` of their sources, and `decoder_input_ids` of their
    own. `labels`: for labelled sequences (rows,), int64 classes or float32 numbers; otherwise (rows, length), the ids
    themselves where trained and -100 elsewhere, not yet shifted. Padding has label -100 by its position, not by its id,
    so `pad_id` may be the end-of-sequence token. So has every sequence's first token, which nothing predicts.
    """
    if not encoded:
        raise ValueError("collate: no sequences")
    if side not in ("right", "left"):
        raise UserError(f"collate: unknown side {side!r}", fix='side="right" or side="left"')
    if isinstance(pad_to_multiple, bool) or pad_to_multiple < 1:
        raise UserError(
            f"collate: pad_to_multiple={pad_to_multiple!r} is not a positive number", fix="pad_to_multiple=8"
        )
    labelled = [item.label is not None for item in encoded]
    if any(labelled) != all(labelled):
        raise ValueError("collate: some sequences are labelled and some are not")
    longest = max(len(item.ids) for item in encoded)
    length = -(-longest // pad_to_multiple) * pad_to_multiple
    shape = (len(encoded), length)
    batch = {
        "input_ids": torch.full(shape, pad_id, dtype=torch.int64),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
    }
    if any(item.types is not None for item in encoded):
        batch["token_type_ids"] = torch.zeros(shape, dtype=torch.int64)
    if all(labelled):
        kind = torch.float32 if any(isinstance(item.label, float) for item in encoded) else torch.int64
        batch["labels"] = torch.tensor([item.label for item in encoded], dtype=kind)
    else:
        batch["labels"] = torch.full(shape, IGNORED, dtype=torch.int64)
    for row, item in enumerate(encoded):
        start = length - len(item.ids) if side == "left" else 0
        place = slice(start, start + len(item.ids))
        ids = torch.tensor(item.ids, dtype=torch.int64)
        batch["input_ids"][row, place] = ids
        batch["attention_mask"][row, place] = 1
        if item.types is not None:
            batch["token_type_ids"][row, place] = torch.tensor(item.types, dtype=torch.int64)
        if item.label is None:
            trained = torch.tensor(item.trained, dtype=torch.bool)
            trained[:1] = False
            batch["labels"][row, place] = torch.where(trained, ids, IGNORED)
    if encoded[0].source is None:
        return batch
    sources = collate([Encoded(item.source or [], [False] * len(item.source or [])) for item in encoded], pad_id)
    read = {key: sources[key] for key in ("input_ids", "attention_mask")}
    return read | {"decoder_input_ids": batch["input_ids"], "labels": batch["labels"]}


def batches(
    encoded: Sequence[Encoded],
    batch_size: int,
    seed: int,
    epoch: int,
    *,
    shuffle: bool = True,
    by_length: bool = False,
) -> list[list[int]]:
    """The batches of one epoch, as lists of indices; the last batch may be short.

    Every index occurs once; of a mixture of data sets, shuffled, each as often as the mixture draws it.

    They depend on (seed, epoch), the sizes and nothing else: not on the process, nor on Python's hash seed. `by_length`
    puts sequences of like length together, to save padding: shuffled ones within windows of 50 batches, whose batches
    are then shuffled; unshuffled, the whole set, shortest first.
    """
    if isinstance(batch_size, bool) or batch_size < 1:
        raise UserError(f"batches: batch_size={batch_size!r} is not a positive number", fix="batch_size=8")
    drawn = getattr(encoded, "drawn", None) if shuffle else None
    order = list(range(len(encoded))) if drawn is None else drawn(seed, epoch)
    generator = random.Random(f"{seed}/{epoch}")
    if shuffle:
        generator.shuffle(order)
    if by_length:
        window = WINDOW * batch_size if shuffle else len(order)
        order = [
            index
            for start in range(0, len(order), max(1, window))
            for index in sorted(order[start : start + window], key=lambda index: length_of(encoded[index]))
        ]
    made = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if by_length and shuffle:
        generator.shuffle(made)
    return made


def length_of(row: Encoded) -> int:
    """Tokens of a row, what its encoder reads included."""
    return len(row.ids) + len(row.source or ())


def token_count(batch: dict[str, Tensor]) -> int:
    """How many terms the loss of a batch sums: trained positions after the causal shift; with one label a row, rows."""
    labels = batch["labels"]
    return labels.shape[0] if labels.dim() == 1 else int((labels[:, 1:] != IGNORED).sum())
