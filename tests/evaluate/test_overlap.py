"""Scores of answers against hand-counted values, against brute force, and against sacrebleu where it is installed."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest

from trimtab.core.errors import UserError
from trimtab.evaluate.overlap import (
    aligned,
    bleu,
    caption,
    cider_d,
    common,
    corpus_scores,
    meteor_exact,
    mteval,
    nist,
    rouge_l,
)

ANSWERS = [
    "The Eagle is a cheap coffee shop near Burger King.",
    "Blue Spice, in the city centre, serves Chinese food.",
    "The Mill is a pub.",
]
REFERENCES = [
    [
        "The Eagle is a low-priced coffee shop near Burger King.",
        "Near Burger King there is a cheap coffee shop, The Eagle.",
    ],
    ["Blue Spice serves Chinese food in the city centre."],
    ["The Mill is a family friendly pub by the riverside.", "The Mill is a pub.", "A pub: The Mill"],
]


def test_tokens_of_mteval() -> None:
    assert mteval('He said "low-priced &amp; £20-25", ok?') == [
        *["he", "said", '"', "low-priced", "&", "£20", "-", "25", '"', ",", "ok", "?"],
    ]
    assert mteval("1,000.5 a.b") == ["1,000.5", "a", ".", "b"]


def test_bleu_by_hand() -> None:
    """One answer of six words: 5 of 6, 3 of 5, 1 of 4 and ... runs match; the nearest reference has six."""
    words = "a b c d e f".split()
    references = [["a", "b", "c", "x", "e", "f"]]
    assert bleu([words], [references]) == 0  # no four-word run matches
    references = ["a b c d x f".split(), "a b".split()]
    wanted = math.exp((math.log(5 / 6) + math.log(3 / 5) + math.log(2 / 4) + math.log(1 / 3)) / 4)
    assert bleu([words], [references]) == pytest.approx(wanted)
    short = bleu(["a b c d".split()], [["a b c d e f".split()]])
    assert short == pytest.approx(math.exp(1 - 6 / 4))


def test_nist_by_hand() -> None:
    """Two references, four words in all: info(a) = log2(4/2), info(b) = log2(4/1), info(ab) = log2(2/1)."""
    references = [[["a", "b"]], [["a", "c"]]]
    found = nist([["a", "b"], ["a", "c"]], references)
    ones = (2 * math.log2(4 / 2) + math.log2(4) + math.log2(4)) / 4
    twos = (math.log2(2) + math.log2(2)) / 2
    assert found == pytest.approx(ones + twos)
    assert nist([["a"], ["a"]], references) == pytest.approx(
        1.0 * math.exp(math.log(0.5) * (math.log(0.5) / math.log(1.5)) ** 2)
    )
    third = nist([["a", "b"], ["a"]], [[["a", "b"]], [["a", "c"]]])
    assert third < found


def test_rouge_by_hand() -> None:
    assert common("a b c d".split(), "b d a".split()) == 2
    precision, recall = 2 / 4, 2 / 3
    wanted = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert rouge_l(["a b c d".split()], [["b d a".split()]]) == pytest.approx(wanted)
    random.seed(0)
    for _ in range(30):
        one, other = ([random.choice("abc") for _ in range(random.randint(0, 6))] for _ in range(2))
        longest = 0
        for size in range(len(one) + 1):
            for kept in itertools.combinations(one, size):
                rest = iter(other)
                if all(word in rest for word in kept):
                    longest = max(longest, size)
        assert common(one, other) == longest


def test_cider_by_brute_force() -> None:
    answers = [caption(one) for one in ANSWERS]
    references = [[caption(one) for one in found] for found in REFERENCES]

    def vector(words: list[str], size: int) -> dict[tuple[str, ...], float]:
        found: dict[tuple[str, ...], float] = {}
        for run, times in Counter(tuple(words[at : at + size]) for at in range(len(words) - size + 1)).items():
            holding = 0
            for rows in references:
                holding += any(run == tuple(row[at : at + size]) for row in rows for at in range(len(row) - size + 1))
            found[run] = times * (math.log(len(references)) - math.log(max(1, holding)))
        return found

    total = 0.0
    for answer, rows in zip(answers, references, strict=True):
        for row in rows:
            for size in (1, 2, 3, 4):
                g, r = vector(answer, size), vector(row, size)
                dot = sum(min(g[run], r[run]) * r[run] for run in set(g) & set(r))
                norm = math.sqrt(sum(one**2 for one in g.values()) * sum(one**2 for one in r.values()))
                apart = max(0, len(answer) - 1) - max(0, len(row) - 1)
                total += (dot / norm if norm else 0) * math.exp(-(apart**2) / 72) / 4 / len(rows)
    assert cider_d(answers, references) == pytest.approx(10 * total / 3)


def test_meteor_by_hand() -> None:
    assert aligned("the cat sat".split(), "the cat sat".split()) == (3, 0, 3, 3)
    assert aligned("the cat sat".split(), "the cat sat down".split()) == (3, 1, 3, 4)
    assert aligned("sat the cat".split(), "the cat sat".split()) == (3, 2, 3, 3)
    assert meteor_exact(["a b".split()], [["a b".split()]]) == 1
    precision, recall = 2 / 3, 2 / 4
    mean = precision * recall / (0.85 * precision + 0.15 * recall)
    assert meteor_exact(["a x b".split()], [["a b c d".split()]]) == pytest.approx(mean * (1 - 0.6))
    assert meteor_exact([["q"]], [[["a"], ["q"]]]) == 1


def test_the_best_answers_score_best_and_nothing_scores_nothing() -> None:
    same = corpus_scores([found[0] for found in REFERENCES], REFERENCES)
    found = corpus_scores(ANSWERS, REFERENCES)
    none = corpus_scores(["zebra", "quagga", "okapi"], REFERENCES)
    assert same["bleu"] == same["rouge_l"] == same["meteor_exact"] == 1
    for name, value in found.items():
        assert 0 < value < same[name]
        assert none[name] == 0
    with pytest.raises(UserError, match="3 answers and 2 sets"):
        corpus_scores(ANSWERS, REFERENCES[:2])


def test_bleu_agrees_with_sacrebleu() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    references = [[found[at] if at < len(found) else None for found in REFERENCES] for at in range(3)]
    wanted = sacrebleu.corpus_bleu(ANSWERS, references, lowercase=True, smooth_method="none").score
    found = bleu([mteval(one) for one in ANSWERS], [[mteval(one) for one in row] for row in REFERENCES])
    assert 100 * found == pytest.approx(wanted, abs=0.01)
