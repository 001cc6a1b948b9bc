"""The token cache gives what encoding gives, and misses whenever anything that ids depend on is another."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from trimtab.data import cache
from trimtab.data.cache import encode_cached
from trimtab.data.encode import encode_all
from trimtab.data.examples import Labelled, PromptCompletion, Text

ROWS = [PromptCompletion(f"What is the capital {n}?", f"Paris {n}, the café", row=n) for n in range(1, 9)]
SETTINGS: dict[str, Any] = {"max_length": 64, "truncation": "right"}


@pytest.fixture(autouse=True)
def worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "WORTH", 1)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever rows are really encoded."""
    calls: list[int] = []

    def counted(*args: Any, **settings: Any) -> Any:
        calls.append(len(args[0]))
        return encode_all(*args, **settings)

    monkeypatch.setattr(cache, "encode_all", counted)
    return calls


def test_the_second_time_nothing_is_encoded_and_all_is_equal(tmp_path: Path, chatml: Any, made: list[int]) -> None:
    first = encode_cached(ROWS, chatml, SETTINGS, tmp_path)
    again = encode_cached(ROWS, chatml, SETTINGS, tmp_path)
    assert made == [8]
    assert again == first == encode_all(ROWS, chatml, **SETTINGS)
    assert type(again[0].ids[0]) is int
    assert type(again[0].trained[0]) is bool


@pytest.mark.parametrize("pair", [None, "the moon"])
@pytest.mark.parametrize("label", ["a", 1, 0.5])
def test_labelled_rows_come_back_with_segments_and_labels(
    tmp_path: Path, words: Any, made: list[int], pair: str | None, label: Any
) -> None:
    others = {"a": "b", 1: 0, 0.5: 2.0}
    rows = [Labelled("The cat", pair, label, row=1), Labelled("sat on", pair, others[label], row=2)]
    first = encode_cached(rows, words, SETTINGS, tmp_path)
    assert encode_cached(rows, words, SETTINGS, tmp_path) == first
    assert made == [2]


def test_sources_of_an_encoder_decoder_come_back(tmp_path: Path, plain: Any, made: list[int]) -> None:
    settings = SETTINGS | {"decoder_start": 0}
    first = encode_cached(ROWS, plain, settings, tmp_path)
    assert encode_cached(ROWS, plain, settings, tmp_path) == first
    assert made == [8]


def test_another_row_template_setting_or_rule_misses(
    tmp_path: Path, make_tokenizer: Any, chatml: Any, made: list[int]
) -> None:
    encode_cached(ROWS, chatml, SETTINGS, tmp_path)
    reworded = copy.deepcopy(chatml)
    reworded.chat_template = chatml.chat_template.replace("assistant\n", "assistant:\n")
    spaced = make_tokenizer(chatml.chat_template, "<|im_end|>", False, False)
    changed = [*ROWS[:-1], PromptCompletion(ROWS[-1].prompt, "Paris 8, the cafe", row=8)]
    others = [
        (ROWS, reworded, SETTINGS),
        (ROWS, spaced, SETTINGS),
        (changed, chatml, SETTINGS),
        (ROWS[:-1], chatml, SETTINGS),
        (ROWS, chatml, SETTINGS | {"max_length": 63}),
        (ROWS, chatml, SETTINGS | {"train_on": "all"}),
        ([Text(row.prompt, row=row.row) for row in ROWS], chatml, SETTINGS),
    ]
    for rows, tokenizer, settings in others:
        assert encode_cached(rows, tokenizer, settings, tmp_path) == encode_all(rows, tokenizer, **settings)
    assert len(made) == 1 + len(others)


@pytest.mark.parametrize("harm", ["cut", "flip", "foreign", "pickle"])
def test_a_damaged_file_is_made_again(tmp_path: Path, chatml: Any, made: list[int], harm: str) -> None:
    first = encode_cached(ROWS, chatml, SETTINGS, tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    flipped = content[:-40] + bytes([content[-40] ^ 1]) + content[-39:]
    file.write_bytes({"cut": content[:-9], "flip": flipped, "foreign": b"{}", "pickle": b"\x80\x04N."}[harm])
    assert encode_cached(ROWS, chatml, SETTINGS, tmp_path) == first
    assert made == [8, 8]
    assert file.read_bytes() == content


def test_a_disk_that_refuses_costs_no_more_than_the_saving(tmp_path: Path, chatml: Any) -> None:
    (tmp_path / "file").write_text("not a directory")
    assert len(encode_cached(ROWS, chatml, SETTINGS, tmp_path / "file")) == 8
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_small_sets_and_dated_templates_are_not_kept(
    tmp_path: Path, chatml: Any, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    dated = copy.deepcopy(chatml)
    dated.chat_template += "{% if false %}{{ strftime_now('%d') }}{% endif %}"
    encode_cached(ROWS, dated, SETTINGS, tmp_path)
    monkeypatch.setattr(cache, "WORTH", 9)
    encode_cached(ROWS, chatml, SETTINGS, tmp_path)
    assert not list(tmp_path.iterdir())
    assert made == [8, 8]


def test_the_oldest_files_make_room(tmp_path: Path, chatml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for length in (60, 61, 62):
        encode_cached(ROWS, chatml, SETTINGS | {"max_length": length}, tmp_path)
    size = next(tmp_path.iterdir()).stat().st_size
    monkeypatch.setattr(cache, "LIMIT_BYTES", int(2.5 * size))
    encode_cached(ROWS, chatml, SETTINGS | {"max_length": 63}, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
