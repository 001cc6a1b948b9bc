"""An encoder-decoder is trained on prompts and completions like any other model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.conftest import WORDS, save_model, tokenizer, write_rows

from trimtab.core.errors import UserError
from trimtab.data.batches import collate, token_count
from trimtab.data.encode import encode_all
from trimtab.data.examples import Conversation, Message, PromptCompletion, Text
from trimtab.engine.loss import loss_sum
from trimtab.evaluate.generate import generate
from trimtab.train.recipe import recipe_from
from trimtab.train.run import tune
from trimtab.train.rundir import open_run
from trimtab.train.verify import verify

START = 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "t5", chat=False, architecture="t5")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = [{"prompt": f"say {one} {two}", "completion": f"{two}"} for one in WORDS[:6] for two in WORDS[6:12]]
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", found)


def recipe(model: Path, rows: Path, **values: Any) -> Any:
    given = {"model": str(model), "data": str(rows), "method": "lora", "heldout": "4", "device": "cpu"}
    return recipe_from(given | {"steps": 60, "batch_size": 16, "learning_rate": 2e-2} | values)


def test_prompts_are_read_and_completions_written() -> None:
    words = tokenizer(chat=False)
    examples = [PromptCompletion("say red", "green"), Conversation((Message("user", "go"), Message("assistant", "on")))]
    made = encode_all(examples, words, max_length=None, decoder_start=START)
    assert words.decode(made[0].source) == "say red"
    assert made[0].ids[0] == START
    assert words.decode(made[0].ids[1:-1]) == "green"
    assert made[0].ids[-1] == words.eos_token_id
    assert made[0].trained == [False] + [True] * (len(made[0].ids) - 1)
    assert words.decode(made[1].source).strip() == "go"
    batch = collate(made.items, words.pad_token_id)
    assert set(batch) == {"input_ids", "attention_mask", "decoder_input_ids", "labels"}
    assert token_count(batch) == made.report.trained_tokens == sum(len(row.ids) - 1 for row in made)


def test_the_loss_is_that_of_transformers(model: Path) -> None:
    from transformers import T5ForConditionalGeneration

    t5, words = T5ForConditionalGeneration.from_pretrained(model).eval(), tokenizer(chat=False)
    examples = [PromptCompletion("say red", "green dog"), PromptCompletion("a longer prompt of words", "cat")]
    batch = collate(encode_all(examples, words, max_length=None, decoder_start=words.pad_token_id).items, 0)
    ours = loss_sum(t5, batch, "seq2seq")[0] / token_count(batch)
    labels = batch["labels"][:, 1:].contiguous()
    theirs = t5(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("truncation", ["drop", "right", "left", "error"])
def test_long_rows(truncation: Any) -> None:
    words = tokenizer(chat=False)
    examples = [PromptCompletion("red " * 20, "green"), PromptCompletion("dog", "cat")]
    settings: dict[str, Any] = {"max_length": 8, "truncation": truncation, "decoder_start": START}
    if truncation == "error":
        with pytest.raises(UserError, match="1 of 2 rows is longer"):
            encode_all(examples, words, **settings)
        return
    made = encode_all(examples, words, **settings)
    assert all(len(row.source or ()) <= 8 for row in made)
    assert len(made) == (1 if truncation == "drop" else 2)
    assert made.report.truncated == (truncation != "drop")


def test_plain_text_has_nothing_to_read() -> None:
    with pytest.raises(UserError, match="no prompt for an encoder"):
        encode_all([Text("some text")], tokenizer(chat=False), max_length=None, decoder_start=START)


@pytest.mark.parametrize("method", ["lora", "houlsby", "prefix_tuning", "loreft"])
def test_a_run_from_file_to_answers(method: str, model: Path, rows: Path, tmp_path: Path) -> None:
    result = tune(recipe(model, rows, method=method, output=str(tmp_path / "run")))
    assert result.record["task"] == "seq2seq"
    assert result.after["loss"] < 0.9 * result.before["loss"]
    trained, words = open_run(tmp_path / "run").load()
    prompts = [words(f"say {one} {two}")["input_ids"] for one, two in [(WORDS[0], WORDS[7]), (WORDS[3], WORDS[9])]]
    assert all(generate(trained, words, prompts, 8))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["packing"] == "off"


def test_it_can_be_verified(model: Path, rows: Path) -> None:
    checks = verify(recipe(model, rows))
    assert not [check for check in checks if check.passed is False]
    assert any(check.passed for check in checks)
