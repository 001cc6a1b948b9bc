"""The measures of GLUE from predictions: F1 and Matthews correlation of classes, Pearson and Spearman of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from trimtab.core.modes import evaluating
from trimtab.data.batches import batches, collate
from trimtab.data.encoded import Encoded
from trimtab.evaluate.loss import pearson


@torch.no_grad()
def labelled_scores(
    model: nn.Module, rows: Sequence[Encoded], task: str, pad_id: int, batch_size: int
) -> dict[str, float]:
    """f1 (of the second of two classes, else the mean over classes) and matthews; or pearson and spearman."""
    device = next(model.parameters()).device
    with evaluating(model):
        found: list[tuple[float, float]] = []
        for group in batches(rows, batch_size, 0, 0, shuffle=False, by_length=True):
            chosen = [rows[index] for index in group]
            batch = {key: value.to(device) for key, value in collate(chosen, pad_id).items() if key != "labels"}
            logits = model(**batch).logits
            guesses = logits.squeeze(-1).tolist() if task == "regress" else logits.argmax(-1).tolist()
            found += [(float(guess), float(row.label or 0)) for guess, row in zip(guesses, chosen, strict=True)]
    if task == "regress":
        return {"pearson": pearson(found), "spearman": spearman(found)}
    guesses, labels = [int(one) for one, _ in found], [int(one) for _, one in found]
    return {"f1": f1(guesses, labels), "matthews": matthews(guesses, labels)}


def f1(guesses: Sequence[int], labels: Sequence[int]) -> float:
    """2·TP / (2·TP + FP + FN): of class 1 where there are two classes, as GLUE asks of MRPC and QQP, else the mean.

    >>> f1([1, 1, 0, 0], [1, 0, 1, 0])
    0.5
    """
    classes = sorted({*guesses, *labels})
    wanted = [1] if set(classes) <= {0, 1} else classes
    scores = []
    for one in wanted:
        right = sum(guess == one == label for guess, label in zip(guesses, labels, strict=True))
        named = sum(guess == one for guess in guesses) + sum(label == one for label in labels)
        scores.append(2 * right / named if named else 0.0)
    return sum(scores) / len(scores)


def matthews(guesses: Sequence[int], labels: Sequence[int]) -> float:
    """Cov(g, l) / √(Cov(g, g) Cov(l, l)) of classes as indicators: for two Matthews' φ; 0 where constant.

    >>> matthews([1, 1, 0, 0], [1, 1, 0, 0])
    1.0
    """
    count = len(guesses)
    classes = sorted({*guesses, *labels})
    right = sum(guess == label for guess, label in zip(guesses, labels, strict=True))
    named, true = ([list(values).count(one) for one in classes] for values in (guesses, labels))
    both = right * count - sum(one * other for one, other in zip(named, true, strict=True))
    spread = (count**2 - sum(one**2 for one in named)) * (count**2 - sum(one**2 for one in true))
    return both / math.sqrt(spread) if spread else 0.0


def spearman(pairs: Sequence[tuple[float, float]]) -> float:
    """Pearson correlation of the ranks, equal values sharing the mean of theirs.

    >>> round(spearman([(1.0, 10.0), (2.0, 100.0), (3.0, 1000.0)]), 6)
    1.0
    """
    one, other = zip(*pairs, strict=True)
    return pearson(list(zip(ranks(one), ranks(other), strict=True)))


def ranks(values: Sequence[float]) -> list[float]:
    """Places in order, from 1.

    >>> ranks([0.3, 0.1, 0.3])
    [2.5, 1.0, 2.5]
    """
    order = sorted(range(len(values)), key=lambda index: values[index])
    found = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for at in range(start, end + 1):
            found[order[at]] = (start + end) / 2 + 1
        start = end + 1
    return found
