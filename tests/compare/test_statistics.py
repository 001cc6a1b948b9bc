"""Paired differences: exact means, intervals that hold as often as they say, ties where nothing can be told."""

from __future__ import annotations

import numpy
import pytest

from trimtab.compare.statistics import Difference, difference, few_seeds, needed_rows, together


def test_the_mean_is_per_term() -> None:
    found = difference([[2.0, 6.0]], [[1.0, 1.0]], [1, 3])
    assert found.mean == (1 + 5) / 4


def test_a_method_ties_with_itself() -> None:
    rows = [[0.3, 0.1, 2.0], [0.2, 0.4, 1.0]]
    found = difference(rows, rows, [1, 1, 1])
    assert (found.mean, found.low, found.high, found.tie) == (0, 0, 0, True)


def test_a_constant_distance_is_certain() -> None:
    found = difference([[1.5, 2.5, 3.5]], [[1.0, 2.0, 3.0]], [1, 1, 1])
    assert found.low == pytest.approx(0.5)
    assert found.high == pytest.approx(0.5)
    assert not found.tie


def test_pairing_takes_the_difficulty_of_rows_away() -> None:
    generator = numpy.random.default_rng(0)
    hard = generator.normal(0, 10, 200)
    one, other = hard + 0.1 + generator.normal(0, 0.05, 200), hard
    found = difference([one.tolist()], [other.tolist()], [1] * 200)
    assert not found.tie
    assert found.high - found.low < 0.03


@pytest.mark.parametrize("seeds", [1, 3])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds: int) -> None:
    """Rows and seeds drawn from known distributions, 150 contests: 95 % intervals, at least 88 % of them right."""
    generator, right = numpy.random.default_rng(1), 0
    for _ in range(150):
        shift = generator.normal(0, 0.05, (seeds, 1)) if seeds > 1 else 0.0
        apart = 0.2 + shift + generator.normal(0, 1, (1, 80)) + generator.normal(0, 0.3, (seeds, 80))
        found = difference(apart.tolist(), numpy.zeros((seeds, 80)).tolist(), [1] * 80)
        right += found.low <= 0.2 <= found.high
    assert 0.88 < right / 150 < 0.99


def test_levels_and_sizes() -> None:
    assert together(0.95, 5) == pytest.approx(0.99)
    assert together(0.95, 0) == 0.95
    assert few_seeds(1) == 1
    assert few_seeds(2) == pytest.approx(2**0.5)
    found = Difference(mean=0.1, low=-0.1, high=0.3, level=0.95)
    assert needed_rows(found, 100) == 401  # half the width again of the mean: four times the rows
    assert needed_rows(Difference(0.0, -1, 1, 0.95), 100) is None
