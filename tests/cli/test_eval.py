"""`trimtab eval` from the command line: runs, plain models, classifiers, and what can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tests.cli.conftest import WORDS, save_model, write_rows

from trimtab.cli.eval import command
from trimtab.core.errors import UserError
from trimtab.evaluate.generate import generate
from trimtab.train.recipe import recipe_from
from trimtab.train.run import tune
from trimtab.train.rundir import open_run


def evaluated(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(command, [*arguments, "--json"], catch_exceptions=False)
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("eval")
    rows = [{"prompt": f"say {one}", "completion": f"{one} {two}"} for one in WORDS[:8] for two in WORDS[8:10]]
    data = write_rows(folder / "rows.jsonl", rows)
    model = save_model(folder / "tiny", chat=True)
    values = {"model": str(model), "data": str(data), "method": "lora", "steps": 3, "output": str(folder / "run")}
    tune(recipe_from(values | {"dtype": "float32", "heldout": "4"}))
    return {"model": str(model), "data": str(data), "run": str(folder / "run")}


def test_a_run_beside_its_base(chat: dict[str, str]) -> None:
    found = evaluated(chat["run"], "--data", chat["data"], "--metrics", "all", "--base", "--max-new-tokens", "5")
    assert set(found["scores"]) >= {
        "loss",
        "perplexity",
        "exact",
        "f1",
        "bleu",
        "nist",
        "rouge_l",
        "cider_d",
        "meteor_exact",
    }
    assert found["scores"]["inputs"] == 8  # sixteen rows, two references each
    assert found["scores"]["loss"] != found["base"]["loss"]
    kept = json.loads(Path(found["written"]).read_text())
    assert [len(one["references"]) for one in kept["answers"]] == [2] * 8


def test_an_adapter_over_a_model_is_the_run(chat: dict[str, str]) -> None:
    run = evaluated(chat["run"], "--data", chat["data"])["scores"]
    same = evaluated(chat["model"], "--adapter", f"{chat['run']}/adapter", "--data", chat["data"], "--dtype", "float32")
    assert same["scores"]["loss"] == pytest.approx(run["loss"], rel=1e-6)


def test_choices_and_a_reference_text(chat: dict[str, str], tmp_path: Path) -> None:
    rows = [{"question": f"say {one}", "choices": [one, WORDS[9]], "answer": 0} for one in WORDS[:5]]
    (tmp_path / "text.txt").write_text(" ".join(WORDS))
    data = write_rows(tmp_path / "asked.jsonl", rows)
    found = evaluated(
        *(chat["run"], "--data", str(data), "--metrics", "choices", "--reference-text", str(tmp_path / "text.txt"))
    )
    assert found["scores"]["questions"] == 5
    assert found["scores"]["reference_loss"] > 0


def test_a_classifier(tmp_path: Path) -> None:
    rows = [{"text": f"{one} cat", "label": "short" if len(one) < 5 else "long"} for one in WORDS]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    model = save_model(tmp_path / "bert", chat=False, architecture="bert")
    tune(recipe_from({"model": str(model), "data": str(data), "steps": 2, "output": str(tmp_path / "run")}))
    found = evaluated(str(tmp_path / "run"), "--data", str(data))["scores"]
    assert set(found) == {"loss", "accuracy", "rows", "f1", "matthews"}
    other = write_rows(tmp_path / "other.jsonl", [{"text": "a", "label": "huge"}, {"text": "b", "label": "long"}])
    with pytest.raises(UserError, match="labels huge are none of the model's: "):
        evaluated(str(tmp_path / "run"), "--data", str(other))


def test_an_encoder_decoder_reads_what_it_was_trained_on(tmp_path: Path) -> None:
    rows = [{"prompt": f"say {one}", "completion": f"{one} {one}"} for one in WORDS[:8]]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    model = save_model(tmp_path / "t5", chat=True, architecture="t5")  # its template is for none of its prompts
    values = {"model": str(model), "data": str(data), "steps": 2, "heldout": str(data), "dtype": "float32"}
    result = tune(recipe_from(values | {"output": str(tmp_path / "run")}))
    found = evaluated(str(tmp_path / "run"), "--data", str(data), "--metrics", "all", "--max-new-tokens", "6")
    assert found["scores"]["loss"] == pytest.approx(result.after["loss"], rel=1e-6)
    trained, words = open_run(tmp_path / "run").load("cpu")
    answers = [one["answer"] for one in json.loads(Path(found["written"]).read_text())["answers"]]
    prompts = [words(row["prompt"]).input_ids for row in rows]
    assert answers == generate(trained, words, prompts, 6)


def test_what_can_be_wrong(chat: dict[str, str]) -> None:
    for arguments, said in (
        (["--metrics", "bleurt"], "no metric bleurt"),
        (["--adapter", "x"], "a run has its adapter"),
        (["--reference-text", "none.txt"], "none.txt cannot be read"),
        (["--metrics", "choices"], "rows.jsonl: row 1: fewer than two choices"),
    ):
        with pytest.raises(UserError, match=said):
            evaluated(chat["run"], "--data", chat["data"], *arguments)
    with pytest.raises(UserError, match="--base needs a run or an adapter"):
        evaluated(chat["model"], "--data", chat["data"], "--base")
