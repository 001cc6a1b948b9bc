"""Scores of answers: known values, and what must not count."""

from __future__ import annotations

import json

import pytest

from trimtab.evaluate.text import exact_match, normalised, record_scores, token_f1


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The  Cat's hat!", "cats hat"),
        ("an apple, a day", "apple day"),
        ("theatre", "theatre"),
        ("Ärger.", "ärger"),
        ("", ""),
    ],
)
def test_normalised_as_squad(text: str, plain: str) -> None:
    assert normalised(text) == plain


def test_exact_match_is_a_share_of_rows() -> None:
    assert exact_match(["The cat.", "dog", "x"], ["cat", "dogs", "y"]) == pytest.approx(1 / 3)
    assert exact_match(["The cat. ", "dog"], ["cat", "dog"], strict=True) == 0.5


def test_token_f1_counts_shared_words_once_per_occurrence() -> None:
    assert token_f1(["cat cat dog"], ["cat dog dog"]) == pytest.approx(2 * 2 / 6)
    assert token_f1(["", "x"], ["", ""]) == 0.5
    assert token_f1(["nothing shared"], ["at all"]) == 0.0


def test_lists_of_different_lengths_or_none_are_refused() -> None:
    with pytest.raises(ValueError, match="1 answers and 2 references"):
        exact_match(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="0 answers"):
        token_f1([], [])


def test_records_are_scored_whole_and_by_field() -> None:
    wanted = [
        json.dumps({"name": "Ada", "count": 2, "date": None}),
        json.dumps({"name": "Bo", "count": 3, "date": "2026-01-02"}),
    ]
    given = ['{"count": 2, "name": "Ada", "date": null}', '{"name": "Bo", "count": "3", "date": null}']
    scores = record_scores(given, wanted)
    assert (scores.rows, scores.valid, scores.exact) == (2, 1.0, 0.5)
    # count: both given, one right; date: wanted once, never given
    assert scores.fields == {"name": 1.0, "count": 0.5, "date": 0.0}
    assert scores.f1 == pytest.approx(0.5)
    assert scores.document()["fields"]["count"] == 0.5


def test_words_around_a_record_cost_validity_but_no_field() -> None:
    scores = record_scores(['Sure! {"a": 1} Anything else?'], ['{"a": 1}'])
    assert (scores.valid, scores.exact, scores.fields) == (0.0, 0.0, {"a": 1.0})
    fenced = record_scores(['```json\n{"a": 1}\n```'], ['{"a": 1}'])
    assert (fenced.valid, fenced.exact) == (1.0, 1.0)


@pytest.mark.parametrize("answer", ["", "{", "[1]", "null", '"text"', "{'a': 1}", "{" * 5000, "{}{}"])
def test_what_is_no_object_is_not_valid(answer: str) -> None:
    scores = record_scores([answer], ['{"a": 1}'])
    assert (scores.valid, scores.exact, scores.fields) == (0.0, 0.0, {"a": 0.0})


def test_types_matter_but_not_how_a_number_is_written() -> None:
    assert record_scores(['{"a": 1.0}'], ['{"a": 1}']).exact == 1.0
    assert record_scores(['{"a": true}'], ['{"a": 1}']).exact == 0.0
    assert record_scores(['{"a": {"b": [1, 2]}}'], ['{"a": {"b": [1, 2]}}']).exact == 1.0


def test_an_extra_field_costs_only_the_exact_match() -> None:
    scores = record_scores(['{"a": 1, "b": 2}'], ['{"a": 1}'])
    assert (scores.exact, scores.fields) == (0.0, {"a": 1.0})


def test_a_value_where_null_is_wanted_lowers_the_precision() -> None:
    scores = record_scores(['{"a": 5}', '{"a": 7}'], ['{"a": null}', '{"a": 7}'])
    assert scores.fields == {"a": pytest.approx(2 / 3)}


def test_a_reference_must_be_a_record() -> None:
    with pytest.raises(ValueError, match="reference 1 is no JSON object"):
        record_scores(["{}"], ["words"])
