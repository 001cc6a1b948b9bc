"""The smaller commands (data, models, methods, quickstart) and what training shows while it runs."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from tests.cli.conftest import save_model

from trimtab import catalog
from trimtab.cli import progress
from trimtab.cli.verb import Verb

Run = Callable[..., Any]


# ---------------------------------------------------------------------------------------------------------- data


def test_data_tells_form_and_rows(trimtab: Run, prompts: Path) -> None:
    done = trimtab("data", prompts, "--examples", "1")
    assert (done.code, done.err) == (0, "")
    for words in (
        "prompt-completion (prompt=prompt, completion=completion)",
        "36, 36 different prompts",
        "say red large",
    ):
        assert words in done.out
    found = trimtab("data", prompts, "--json").document
    assert (found["form"], found["rows"], found["kind"], found["ignored"]) == ("prompt-completion", 36, "jsonl", [])
    assert found["examples"][0] == {"row": 1, "prompt": "say red large", "completion": "large red"}


def test_data_with_a_model_marks_exactly_the_trained_tokens(
    trimtab: Run, prompts: Path, chat_model: Path, plain_model: Path
) -> None:
    done = trimtab("data", prompts, "--model", chat_model, "--examples", "1")
    assert done.code == 0, done.err
    assert "<|im_start|>assistant\n[[large red<|im_end|>]]" in done.out
    assert "36 rows -> 36 sequences" in done.out
    found = trimtab("data", prompts, "--model", plain_model, "--examples", "1", "--json").document
    assert found["examples"][0]["pieces"] == [
        {"text": "say red large", "trained": False},
        {"text": "large red<|endoftext|>", "trained": True},
    ]
    assert found["report"]["sequences"] == 36
    assert any("without white space" in note for note in found["report"]["notes"])
    whole = trimtab("data", prompts, "--model", chat_model, "--train-on", "all", "--examples", "1", "--json").document
    assert [piece["trained"] for piece in whole["examples"][0]["pieces"]] == [True]


def test_data_of_an_encoder_decoder_shows_what_each_side_reads(trimtab: Run, prompts: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "t5", chat=True, architecture="t5")
    found = trimtab("data", prompts, "--model", model, "--examples", "1", "--json").document
    assert found["examples"][0]["pieces"] == [
        {"text": "say red large<|endoftext|>", "trained": False},
        {"text": "large red<|im_end|>", "trained": True},
    ]
    assert all(one["passed"] for one in found["checks"])
    assert found["report"]["template"] == "plain"


def test_data_tells_whether_the_end_is_trained_and_padding_is_not(
    trimtab: Run, prompts: Path, chat_model: Path, plain_model: Path, encoder: Path, labelled: Path
) -> None:
    for model, token in ((chat_model, "<|im_end|>"), (plain_model, "<|endoftext|>")):
        done = trimtab("data", prompts, "--model", model, "--examples", "0")
        assert f"trained in 36 of 36 sequences ({token})" in done.out
        assert "not trained (<|endoftext|>)" in done.out
    cut = trimtab(
        "data", prompts, "--model", chat_model, "--max-length", "24", "--truncation", "right", "--json"
    ).document
    assert [one["passed"] for one in cut["checks"]] == [False, True]
    assert trimtab("data", labelled, "--model", encoder, "--json").document["checks"] == []


def test_data_counts_labels(trimtab: Run, labelled: Path, encoder: Path) -> None:
    assert "colour 15, other 42" in trimtab("data", labelled).out
    done = trimtab("data", labelled, "--model", encoder, "--examples", "1")
    assert "label colour" in done.out
    assert "[[" not in done.out


def test_data_that_is_wrong_says_so(trimtab: Run, prompts: Path, chat_model: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (["nosuch.jsonl"], "no such file"),
        ([prompts, "--columns", "prompt"], "is not of the form role=column"),
        ([prompts, "--columns", "prompt=nosuch,completion=completion"], "no column 'nosuch'"),
        ([prompts, "--model", chat_model, "--max-length", "8"], "longer than max_length=8"),
        ([prompts, "--model", tmp_path], "no tokenizer could be loaded"),
        ([prompts, "--truncation", "cut"], "'cut' is not one of"),
    ):
        done = trimtab("data", *arguments)
        assert done.code == 2, arguments
        assert message in done.err
        assert done.err.count("error:") == 1


# -------------------------------------------------------------------------------------------------------- models


def test_models_says_which_are_here(trimtab: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    found = trimtab("models", "--json").document
    assert {one["name"] for one in found} >= {"smollm2-135m-instruct", "minilm-l6"}
    assert not any(one["cached"] for one in found)
    assert "93 MB to fetch" in trimtab("models").out
    directory = tmp_path / "home" / "models" / "minilm-l6"
    directory.mkdir(parents=True)
    (directory / "starter.json").write_text("{}")
    assert trimtab("models", "minilm-l6", "--json").document["cached"] is True
    one = trimtab("models", "smollm2-135m-instruct")
    assert "--fetch (93 MB)" in one.out
    assert "Apache-2.0" in one.out
    assert trimtab("models", "--fetch").code == 2
    assert "did you mean minilm-l6?" in trimtab("models", "minilm").err


# ------------------------------------------------------------------------------------------------------- methods


def test_methods_lists_every_method_preset_and_format(trimtab: Run) -> None:
    done = trimtab("methods")
    assert (done.code, done.err) == (0, "")
    for words in ("weight methods", "lora", "2106.09685", "presets", "dora", "storage formats", "nf4", "merges"):
        assert words in done.out
    found = trimtab("methods", "--json").document
    assert [(one["name"], one["kind"]) for one in found] == catalog.entries()
    assert {one["name"] for one in trimtab("methods", "*tuning", "--json").document} >= {"prefix_tuning", "ln_tuning"}


@pytest.mark.parametrize("name", ["lora", "LoRA", "prefix-tuning", "DoRA", "nf4", "HoulsbyNorm"])
def test_methods_describes_one_in_any_spelling(trimtab: Run, name: str) -> None:
    done = trimtab("methods", name)
    assert (done.code, done.err) == (0, "")
    assert "settings and their defaults" in done.out
    assert "trimtab tune --model MODEL --data FILE --" in done.out
    found = trimtab("methods", name, "--json").document
    assert found["name"].replace("_", "") == name.lower().replace("-", "")
    assert found["settings"]


def test_methods_says_what_a_method_does_not_keep_and_where_a_preset_goes(trimtab: Run) -> None:
    assert "virtual tokens have no weight to merge into" in trimtab("methods", "prefix_tuning").out
    assert "at 'attn, ffn'" in trimtab("methods", "houlsbynorm").out


def test_methods_shows_the_start_of_a_preset_and_starts_on_their_own(trimtab: Run) -> None:
    done = trimtab("methods", "pissa")
    assert "the start pissa\n  s·B A = U_r S_r V_rᵀ" in done.out
    assert trimtab("methods", "pissa", "--json").document["start"]["kind"] == "start"
    assert "--method lora --start init_b" in trimtab("methods", "init_b").out
    assert "--quantize nf4" in trimtab("methods", "loftq").out


def test_methods_counts_on_a_model_from_its_configuration_alone(
    trimtab: Run, chat_model: Path, encoder: Path, tmp_path: Path
) -> None:
    for name, model in (("writer", chat_model), ("reader", encoder)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes((model / "config.json").read_bytes())
    found = trimtab("methods", "lora", "--model", tmp_path / "writer", "--json").document["on_model"]
    assert found == {"parameters": 7424, "share": found["share"], "sites": 14, "learning_rate": 0.048}
    done = trimtab("methods", "*lora*", "--model", tmp_path / "reader")
    assert (done.code, done.err) == (0, "")
    assert "share" in done.out
    assert "7,424 (" in trimtab("methods", "lora", "--model", tmp_path / "writer").out
    assert "linear weights" in trimtab("methods", "nf4", "--model", tmp_path / "writer").out
    lost = trimtab("methods", "lora", "--model", tmp_path)
    assert (lost.code, "no config.json" in lost.err) == (2, True)


def test_an_unknown_method_names_the_nearest(trimtab: Run) -> None:
    done = trimtab("methods", "lorra")
    assert (done.code, "did you mean lora" in done.err) == (2, True)
    assert trimtab("methods", "zz*").code == 2


# ------------------------------------------------------------------------------------------------------ progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


STEPS = [
    {"step": n, "epoch": n / 40, "loss": 2.0 - n / 40, "learning_rate": 1e-3, "rows_per_second": 8.0, "rows": 8 * n}
    for n in range(1, 41)
]


def told(reporter: Any) -> None:
    reporter.stage("reading data")
    reporter.note("36 rows")
    reporter.evaluated("before", {"loss": 2.0, "perplexity": 7.39, "tokens": 100})
    reporter.start(40, 320)
    for line in STEPS:
        reporter.step(line)
    reporter.stage("measuring")
    reporter.evaluated("after", {"loss": 1.0, "perplexity": 2.72, "tokens": 100})
    reporter.finish(None)
    reporter.close()


def chosen(stream: Any, machine: bool, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "stdout", stream)
    context = click.Context(Verb("x"), obj=machine)
    with context:
        return progress.reporter()


def test_plain_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    told(chosen(stream, False, monkeypatch))
    lines = stream.getvalue().splitlines()
    assert lines[:4] == [
        "reading data ...",
        "  36 rows",
        "  held out, before training: loss 2, perplexity 7.39",
        "training: 40 steps",
    ]
    steps = [line for line in lines if line.startswith("  step ")]
    assert len(steps) == 11
    assert steps[0].startswith("  step 1/40  loss 1.975  8 rows/s")
    assert steps[-1].startswith("  step 40/40  loss 1.2")
    assert "\x1b" not in stream.getvalue()


def test_one_live_line_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    told(chosen(stream, False, monkeypatch))
    text = stream.getvalue()
    assert "40/40" in text
    assert "rows/s" in text
    assert "left" in text
    assert "\x1b[2K" in text  # drawn over, then taken away
    assert "  trained 40 steps, loss 1.2" in click.unstyle(text)
    assert click.unstyle(text).rstrip().endswith("held out, after training: loss 1, perplexity 2.72")


def test_nothing_at_all_for_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    told(chosen(stream, True, monkeypatch))
    assert stream.getvalue() == ""


# ---------------------------------------------------------------------------------------------------- quickstart


def test_quickstart_tunes_compares_and_says_what_is_next(
    trimtab: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.cli import quickstart

    model = save_model(tmp_path / "model", chat=True, positions=512)
    small = {**quickstart.RECIPE, "model": str(model), "limit": 16, "steps": 2, "rank": 2}
    monkeypatch.setattr(quickstart, "RECIPE", small)
    monkeypatch.setattr(quickstart, "MAX_NEW_TOKENS", 4)
    done = trimtab("quickstart")
    assert done.code == 0, done.err
    for words in (
        "before",
        "after",
        "wanted",
        "exact match",
        "valid JSON",
        "F1 of intent",
        "60 held-out messages",
        "trimtab chat runs/",
        "trimtab merge runs/",
        "all of it took",
    ):
        assert words in done.out
    assert "trimtab chat runs/" in done.out
    assert "trimtab merge runs/" in done.out
    done = trimtab("quickstart", "--output", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    assert set(done.document["scores"]) == {"before", "after"}
    assert len(done.document["examples"]) == 3
    assert done.document["directory"] == str(tmp_path / "run")
    command = quickstart.command_line(quickstart.recipe_from({**small, "data": "a b", "heldout": "c"}))
    assert "--rank 2" in command
    assert "--data 'a b'" in command
    taken = trimtab("quickstart", "--output", tmp_path / "run")
    assert (taken.code, "not an empty directory" in taken.err) == (2, True)


def test_the_shipped_rows_are_records_and_no_prompt_is_on_both_sides() -> None:
    from importlib import resources

    folder = resources.files("trimtab.data") / "quickstart"
    parts = {}
    for name in ("train", "test"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        assert all(set(json.loads(row["completion"])) == {"intent", "name", "item", "quantity", "date"} for row in rows)
        parts[name] = {row["prompt"] for row in rows}
    assert len(parts["test"]) == 60
    assert not parts["train"] & parts["test"]


def test_verify_answers_with_its_exit_code(trimtab: Run, chat_model: Path, prompts: Path) -> None:
    found = trimtab("verify", "--model", chat_model, "--data", prompts, "--rank", "4", "--device", "cpu", "--json")
    assert found.code == 0
    checks = {one["name"]: one["passed"] for one in found.document["checks"]}
    assert checks["packed with common beginnings = alone"] is True
    text = trimtab("verify", "--model", chat_model, "--data", prompts, "--device", "cpu")
    assert "everything that applies holds" in text.out
