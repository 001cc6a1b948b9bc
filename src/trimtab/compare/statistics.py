"""Differences between methods with intervals: the same rows and seeds on both sides, drawn again many times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy

DRAWS = 4000


@dataclass(frozen=True)
class Difference:
    """Mean of (one − other) with an interval; `tie` where the interval holds 0."""

    mean: float
    low: float
    high: float
    level: float

    @property
    def tie(self) -> bool:
        return self.low <= 0 <= self.high


def difference(
    one: Sequence[Sequence[float]],
    other: Sequence[Sequence[float]],
    terms: Sequence[int],
    *,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """The paired difference of two methods per term, with a bootstrap interval over rows and seeds.

    `one` and `other` hold a list of row sums for every seed, in the same order; `terms` the terms of each row. A draw
    takes rows with replacement and, where there are several, seeds with replacement: both are a sample of what could
    have been. The interval runs between quantiles of the draws, and is widened by `few_seeds`.
    """
    apart = numpy.asarray(one, float) - numpy.asarray(other, float)  # (seeds, rows)
    seeds, rows = apart.shape
    weights = numpy.asarray(terms, float)
    mean = float(apart.mean(0).sum() / weights.sum())
    generator = numpy.random.default_rng(seed)
    counts = generator.multinomial(rows, numpy.full(rows, 1 / rows), size=DRAWS)  # how often each row is drawn
    chosen = generator.multinomial(seeds, numpy.full(seeds, 1 / seeds), size=DRAWS) / seeds
    drawn = ((counts @ apart.T) * chosen).sum(1) / (counts @ weights)
    low, high = numpy.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    wider = few_seeds(seeds)
    return Difference(mean, mean - wider * float(mean - low), mean + wider * float(high - mean), level)


def few_seeds(seeds: int) -> float:
    """√(n / (n − 1)): a bootstrap over n seeds sees only (n − 1)/n of their variance; 1 for one seed."""
    return 1.0 if seeds < 2 else (seeds / (seeds - 1)) ** 0.5


def together(level: float, comparisons: int) -> float:
    """The level of each of several intervals that hold all at once with `level` (Bonferroni)."""
    return 1 - (1 - level) / max(1, comparisons)


def needed_rows(found: Difference, rows: int) -> int | None:
    """About how many held-out rows would tell a difference of this size apart; None where it is none at all."""
    if found.mean == 0:
        return None
    half = (found.high - found.low) / 2
    deviation = half / NormalDist().inv_cdf((1 + found.level) / 2)
    needed = rows * (NormalDist().inv_cdf((1 + found.level) / 2) * deviation / abs(found.mean)) ** 2
    return int(min(needed, 1e9)) + 1
