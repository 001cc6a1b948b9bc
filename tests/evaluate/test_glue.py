"""Matthews, F1 and Spearman against their definitions in NumPy."""

from __future__ import annotations

import numpy
import pytest

from trimtab.evaluate.glue import f1, matthews, spearman


def test_matthews_of_two_classes_is_phi_and_of_more_the_correlation_of_indicators() -> None:
    generator = numpy.random.default_rng(0)
    for classes in (2, 4):
        guesses, labels = generator.integers(0, classes, (2, 50))
        g, true = numpy.eye(classes)[guesses], numpy.eye(classes)[labels]
        g, true = g - g.mean(0), true - true.mean(0)
        wanted = (g * true).sum() / numpy.sqrt((g * g).sum() * (true * true).sum())
        assert matthews(guesses.tolist(), labels.tolist()) == pytest.approx(wanted)
    phi = numpy.corrcoef([1, 1, 0, 0, 1], [1, 0, 0, 0, 1])[0, 1]
    assert matthews([1, 1, 0, 0, 1], [1, 0, 0, 0, 1]) == pytest.approx(phi)
    assert matthews([1, 1], [1, 0]) == 0


def test_f1() -> None:
    assert f1([1, 1, 1, 0], [1, 0, 1, 1]) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert f1([0, 0], [0, 0]) == 0  # nobody said 1
    assert f1([0, 1, 2], [0, 2, 2]) == pytest.approx((1 + 0 + 2 / 3) / 3)


def test_spearman_shares_ranks() -> None:
    x, y = [1.0, 2.0, 2.0, 4.0], [1.0, 3.0, 2.0, 8.0]
    wanted = numpy.corrcoef([1, 2.5, 2.5, 4], [1, 3, 2, 4])[0, 1]
    assert spearman(list(zip(x, y, strict=True))) == pytest.approx(wanted)
