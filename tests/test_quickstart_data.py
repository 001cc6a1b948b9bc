"""The shipped quickstart rows: made by the generator beside them, well formed, and with nothing to remember."""

from __future__ import annotations

import datetime
import json
from importlib import resources
from typing import Any

import pytest

import make_quickstart_data as generator

KEYS = ["intent", "name", "item", "quantity", "date"]


def shipped(name: str) -> str:
    return (resources.files("trimtab.data") / "quickstart" / name).read_text(encoding="utf-8")


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in shipped(name).splitlines()]


def records(name: str) -> list[dict[str, Any]]:
    return [json.loads(row["completion"]) for row in rows(name)]


def test_the_generator_makes_these_files() -> None:
    assert generator.files() == {name: shipped(name) for name in ("train.jsonl", "test.jsonl")}


@pytest.mark.parametrize(("name", "count"), [("train.jsonl", 480), ("test.jsonl", 60)])
def test_every_row_is_a_prompt_and_a_strict_record(name: str, count: int) -> None:
    assert len({row["prompt"] for row in rows(name)}) == count
    for row, record in zip(rows(name), records(name), strict=True):
        assert list(row) == ["prompt", "completion"]
        assert list(record) == KEYS
        assert record["intent"] in generator.TEMPLATES
        assert 1 <= record["quantity"] <= 12
        assert record["date"] is None or datetime.date.fromisoformat(record["date"])
        message = row["prompt"].removeprefix(generator.INSTRUCTION + " ")
        assert len(message) < 110
        assert record["name"] in message
        assert record["item"] in message.lower()
        assert not set("[]{}") & set(message)


def test_intents_come_equally_often() -> None:
    for name in ("train.jsonl", "test.jsonl"):
        intents = [record["intent"] for record in records(name)]
        assert {intents.count(intent) for intent in intents} == {len(intents) // 4}


def test_no_name_and_no_item_of_a_held_out_row_was_trained_on() -> None:
    def words(name: str, key: str) -> set[str]:
        return {word for record in records(name) for word in record[key].split()}

    qualities = {record["item"].split()[0] for record in records("train.jsonl") if " " in record["item"]}
    assert not words("test.jsonl", "name") & words("train.jsonl", "name")
    assert not (words("test.jsonl", "item") - qualities) & words("train.jsonl", "item")
    assert {record["item"].split()[-1] for record in records("test.jsonl")}.isdisjoint(words("train.jsonl", "item"))
