"""`trimtab tune`: flags from the recipe and the method, and every kind of bad input."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from tests.cli.conftest import write_rows

from trimtab.cli import main as program
from trimtab.cli import tune as module
from trimtab.train.recipe import ALIASES, Recipe, fields

Run = Callable[..., Any]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """Collects the recipes that would be trained."""
    found: list[Recipe] = []

    class Done(Exception):
        pass

    def remember(recipe: Recipe) -> None:
        found.append(recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run", remember)
    return found


def test_every_recipe_field_is_a_flag_with_its_help_and_default() -> None:
    text = " ".join(CliRunner().invoke(program.cli, ["tune", "--help"]).output.split())
    for name, field in fields().items():
        if not name.endswith("settings"):
            assert f"--{name.replace('_', '-')} " in text
            assert field.metadata["help"] in text
    assert "[default: 0.05]" in text
    for title in ("What:", "Data:", "Training:", "Other:"):
        assert title in text
    assert "--lora-r" not in text


def test_the_help_of_a_method_shows_its_settings_with_defaults(tmp_path: Path) -> None:
    text = CliRunner().invoke(program.cli, ["tune", "--method", "lora", "--help"]).output
    assert "Settings of lora:" in text
    assert "--rank NUMBER [default: 8]" in " ".join(text.split())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: houlsby\n")
    for arguments in (
        ["tune", "--method=houlsby", "--help"],
        ["tune", str(recipe), "--help"],
        ["tune", "--peft_type", "houlsby", "-h"],
    ):
        assert "Settings of houlsby:" in CliRunner().invoke(program.cli, arguments).output


def test_flags_make_a_recipe(trimtab: Run, asked: list[Recipe]) -> None:
    trimtab(
        "tune",
        "--model",
        "m",
        "--data",
        "d",
        "--method",
        "dora",
        "--rank",
        "16",
        "--learning-rate",
        "2e-4",
        "--checkpointing",
        "--columns",
        "prompt=a,completion=b",
        "--where",
        "q, v",
        "--seed=7",
    )
    (recipe,) = asked
    assert (recipe.method, dict(recipe.settings), recipe.learning_rate, recipe.checkpointing) == (
        "dora",
        {"rank": "16"},
        2e-4,
        "block",
    )
    assert (dict(recipe.columns), recipe.where, recipe.seed) == ({"prompt": "a", "completion": "b"}, "q, v", 7)


def test_names_other_tools_use_are_flags_too(trimtab: Run, asked: list[Recipe]) -> None:
    trimtab(
        "tune",
        "--model_name_or_path",
        "m",
        "--dataset",
        "d",
        "--lora_r",
        "4",
        "--lora-alpha=8",
        "--lr",
        "1e-3",
        "--num-train-epochs",
        "2",
        "--gradient_checkpointing",
        "--torch_compile",
        "--per_device_train_batch_size",
        "3",
    )
    (recipe,) = asked
    assert (recipe.model, recipe.data, dict(recipe.settings)) == ("m", "d", {"rank": "4", "alpha": "8"})
    assert (recipe.learning_rate, recipe.epochs, recipe.batch_size) == (1e-3, 2.0, 3)
    assert (recipe.checkpointing, recipe.compile) == ("block", "blocks")


def test_every_alias_is_known_to_the_command_line(trimtab: Run, asked: list[Recipe]) -> None:
    for alias, name in ALIASES.items():
        value = (
            []
            if name in ("checkpointing", "compile")
            else [{"method": "lora", "optimizer": "lion", "schedule": "linear", "dtype": "auto"}.get(name, "1")]
        )
        needed = {"model": "m", "data": "d"}
        needed.pop(name, None)
        others = [word for key, text in needed.items() for word in (f"--{key}", text)]
        done = trimtab("tune", *others, "--" + alias, *value)
        assert done.code == 130, (alias, done.err)


def test_a_method_may_be_a_name_with_settings(trimtab: Run, asked: list[Recipe], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\ndata: d\nmethod: {name: vera, rank: 3}\n")
    trimtab("tune", recipe)
    assert [(one.method, dict(one.settings)) for one in asked] == [("vera", {"rank": 3})]


def test_flags_override_the_recipe_file_under_any_name(trimtab: Run, asked: list[Recipe], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("base_model: m\ndata: d\nlr: 1e-4\npeft_type: lora\nlora_r: 2\nalpha: 4\ncheckpointing: true\n")
    trimtab("tune", recipe)
    trimtab("tune", recipe, "--lr", "5e-4", "--rank", "32", "--checkpointing", "off", "--model", "other")
    recipe.write_text("base_model: m\ndata: d\nmethod: lora\n")
    trimtab("tune", "--method", "ia3", recipe)
    first, second, third = asked
    assert (first.model, first.learning_rate, dict(first.settings), first.checkpointing) == (
        "m",
        1e-4,
        {"rank": 2, "alpha": 4},
        "block",
    )
    assert (second.model, second.learning_rate, second.settings["rank"], second.checkpointing) == (
        "other",
        5e-4,
        "32",
        "off",
    )
    assert (third.method, third.settings) == ("ia3", {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rnak", "3"], "error: no flag --rnak for `trimtab tune` with method lora\n  fix: did you mean --rank?"),
        (["--modle", "3"], "did you mean --model?"),
        (["--batch", "3"], "did you mean --batch-size?"),
        (["--vectors", "3"], "error: --vectors is a setting of vb_lora, not of lora\n  fix: settings of lora:"),
        (["--method", "lorra"], "error: no method or preset named 'lorra'\n  fix: did you mean lora"),
        (["--method", "houlsby", "--rank", "3"], "--rank is a setting of"),
        ([], "`model` is missing; `data` is missing"),
        (["--model"], "Option '--model' requires an argument."),
        (["--model", "m", "--data", "d", "--epochs", "many", "--schedule", "step"], "epochs: "),
        (["nosuch.yaml"], "cannot read nosuch.yaml"),
    ],
)
def test_wrong_flags_are_one_message_with_a_fix(trimtab: Run, arguments: list[str], message: str) -> None:
    done = trimtab("tune", *arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert done.err.count("error:") == 1
    assert "Traceback" not in done.err


def test_a_recipe_file_with_unknown_keys_names_all_of_them(trimtab: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("modle: m\ndata: d\nrnak: 3\n")
    done = trimtab("tune", recipe)
    assert done.code == 2
    assert "unknown key 'modle' (nearest: model)" in done.err
    assert "unknown key 'rnak' (nearest: rank)" in done.err


@pytest.fixture(scope="session")
def bad_inputs(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> dict[str, list[str]]:
    """Name -> flags of a run that must be refused."""
    folder = tmp_path_factory.mktemp("bad")
    good = write_rows(folder / "good.jsonl", [{"prompt": f"say {n}", "completion": f"{n}"} for n in range(20)])
    rows: dict[str, str] = {
        "empty": "",
        "broken": '{"prompt": "a"\n',
        "neither": '{"note": "a", "id": 1}\n',
        "blank prompt": '{"prompt": " ", "completion": "b"}\n' * 3,
        "mixed": '{"prompt": "a", "completion": "b"}\n' * 3 + '{"messages": [{"role": "user", "content": "a"}]}\n',
    }
    model = ["--model", str(chat_model)]
    cases = {
        "missing": [*model, "--data", str(folder / "nosuch.jsonl")],
        "a directory": [*model, "--data", str(folder)],
    }
    for name, text in rows.items():
        path = folder / f"{name}.jsonl"
        path.write_text(text)
        cases[name] = [*model, "--data", str(path)]
    binary = folder / "latin.csv"
    binary.write_bytes("prompt,completion\ncaf\xe9,x\n".encode("latin-1"))
    cases["not utf-8"] = [*model, "--data", str(binary)]
    cases["wrong column"] = [*model, "--data", str(good), "--columns", "prompt=question,completion=completion"]
    cases["wrong role"] = [*model, "--data", str(good), "--columns", "promt=prompt"]
    cases["too long"] = [*model, "--data", str(good), "--max-length", "5"]
    cases["task"] = [*model, "--data", str(good), "--task", "classify"]
    cases["held out"] = [*model, "--data", str(good), "--heldout", "nosuch.jsonl"]
    cases["where"] = [*model, "--data", str(good), "--where", "q_prjo"]
    cases["format"] = [*model, "--data", str(good), "--quantize", "nf5"]
    cases["no model"] = ["--model", str(folder / "nosuch"), "--data", str(good)]
    bare = folder / "bare"
    shutil.copytree(chat_model, bare)
    (bare / "model.safetensors").unlink()
    cases["no weights"] = ["--model", str(bare), "--data", str(good)]
    cut = folder / "cut"
    shutil.copytree(chat_model, cut)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-100])
    cases["cut weights"] = ["--model", str(cut), "--data", str(good)]
    taken = folder / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")
    cases["output exists"] = [*model, "--data", str(good), "--output", str(taken)]
    if os.name == "posix" and os.geteuid() != 0:
        locked = write_rows(folder / "locked.jsonl", [])
        locked.chmod(0)
        cases["unreadable"] = [*model, "--data", str(locked)]
    return cases


EXPECTED = {
    "missing": "no such file",
    "a directory": "is a directory",
    "empty": "is empty",
    "broken": "line 1: broken JSON",
    "neither": "no form fits the columns note, id",
    "blank prompt": "neither prompt nor text",
    "mixed": "the row looks like messages: one file must have one form",
    "not utf-8": "not UTF-8 text: byte 0xe9",
    "wrong column": "no column 'question' for prompt",
    "wrong role": "nearest: prompt",
    "too long": "longer than max_length=5",
    "task": "classify was asked for",
    "held out": "nosuch.jsonl",
    "where": "matched 0 of",
    "format": "no storage format named 'nf5'",
    "no model": "nosuch does not exist",
    "no weights": "model.safetensors",
    "cut weights": "cut off or damaged",
    "output exists": "exists and is not an empty directory",
}


@pytest.mark.parametrize("case", EXPECTED)
def test_bad_input_is_one_message_and_leaves_nothing_behind(
    trimtab: Run, bad_inputs: dict[str, list[str]], case: str, tmp_path: Path
) -> None:
    done = trimtab("tune", "--steps", "1", *bad_inputs[case])
    assert done.code == 2, done.err
    assert EXPECTED[case] in done.err
    assert done.err.startswith("error: ")
    assert done.err.count("error:") == 1
    assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


def test_an_unreadable_file_is_one_message(
    trimtab: Run, chat_model: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    done = trimtab("tune", "--model", chat_model, "--data", prompts)
    assert done.code == 2
    assert "cannot be read: Permission denied" in done.err


def test_a_full_disk_at_the_end_is_one_message_and_leaves_no_adapter(
    trimtab: Run, chat_model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trimtab.core.files as saving

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    real = os.fsync
    monkeypatch.setattr(saving.os, "fsync", lambda handle: full(handle) if big(handle) else real(handle))
    done = trimtab("tune", "--model", chat_model, "--data", prompts, "--steps", "1", "--output", tmp_path / "run")
    assert done.code == 2
    assert "No space left on device" in done.err
    assert "free some space" in done.err
    assert done.err.count("error:") == 1
    left = sorted(
        str(path.relative_to(tmp_path))
        for path in tmp_path.rglob("*")
        if "adapter" in str(path) or "partial" in str(path)
    )
    assert left == []


def test_a_disk_too_full_for_the_plot_costs_only_the_plot(
    trimtab: Run, chat_model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.core.errors import UserError
    from trimtab.train import rundir

    def full(*arguments: Any) -> None:
        raise UserError("save: could not write 42,468 bytes")

    monkeypatch.setattr(rundir, "plot_loss", full)
    done = trimtab("tune", "--model", chat_model, "--data", prompts, "--steps", "1", "--output", tmp_path / "run")
    assert done.code == 0
    assert "complete, but without its plot" in done.out
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"


def test_a_disk_that_is_full_at_once_leaves_nothing(
    trimtab: Run, chat_model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trimtab.core.files as saving

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving.os, "fsync", full)
    done = trimtab("tune", "--model", chat_model, "--data", prompts, "--steps", "1", "--output", tmp_path / "run")
    assert (done.code, "No space left on device" in done.err) == (2, True)
    assert not (tmp_path / "run").exists()


def big(handle: int) -> bool:
    """Whether an open file is an adapter's tensors and not a record of text."""
    return os.fstat(handle).st_size > 8000


def test_tune_prints_what_was_decided_and_what_came_of_it(trimtab: Run, chat_model: Path, prompts: Path) -> None:
    done = trimtab("tune", "--model", chat_model, "--data", prompts, "--steps", "20", "--rank", "4")
    assert done.code == 0, done.err
    assert done.err == ""
    for words in (
        "prompt-completion data: 32 training rows, 4 held out",
        "LoRA at 14 sites",
        "learning rate",
        "step 20/20",
        "before  after",
        "perplexity",
        "trained",
        "rows/s",
        "peak memory",
        "trimtab chat runs/tiny-chat-lora-1",
        "trimtab inspect runs/tiny-chat-lora-1",
    ):
        assert words in done.out
    lines = [line for line in done.out.splitlines() if line.startswith("  step ")]
    assert 5 <= len(lines) <= 12


def test_tune_json_is_one_document(trimtab: Run, chat_model: Path, prompts: Path, tmp_path: Path) -> None:
    done = trimtab(
        "tune", "--model", chat_model, "--data", prompts, "--steps", "2", "--json", "--output", tmp_path / "run"
    )
    assert done.code == 0, done.err
    found = done.document
    assert found["directory"] == str(tmp_path / "run")
    assert found["trainable"] < found["total"]
    assert set(found["before"]) >= {"loss", "perplexity"}
    assert found["record"] == json.loads((tmp_path / "run" / "run.json").read_text())
    again = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert again["steps"] == 2


def test_resume_takes_no_other_flags(trimtab: Run, tmp_path: Path) -> None:
    found = trimtab("tune", "--resume", tmp_path, "--rank", "4")
    assert found.code == 2
    assert "--rank" in found.err


def test_resume_of_what_is_no_run_names_what_is_missing(trimtab: Run, tmp_path: Path) -> None:
    found = trimtab("tune", "--resume", tmp_path)
    assert found.code == 2
    assert "recipe.yaml" in found.err


def test_find_lr_tries_rates_and_trains_nothing(trimtab: Run, chat_model: Path, prompts: Path, tmp_path: Path) -> None:
    found = trimtab("tune", "--model", chat_model, "--data", prompts, "--find-lr", "--device", "cpu", "--json")
    assert found.code == 0
    assert len(found.document["rates"]) == len(found.document["losses"]) > 10
    assert Path(found.document["plot"]).is_file()


def test_a_key_under_two_names_is_refused(trimtab: Run, chat_model: Path, prompts: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "twice.yaml"
    recipe.write_text(f"model: {chat_model}\ndata: {prompts}\nlr: 1e-3\nlearning_rate: 2e-3\n")
    for arguments in ([recipe], ["--model", chat_model, "--data", prompts, "--lr", "1", "--learning-rate", "2"]):
        done = trimtab("tune", *arguments)
        assert done.code == 2
        assert "are the same key" in done.err
    assert trimtab("tune", recipe, "--resume", "x").code == 2


def test_an_output_that_cannot_be_made_is_refused_before_any_work(
    trimtab: Run, chat_model: Path, prompts: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    done = trimtab("tune", "--model", chat_model, "--data", prompts, "--output", tmp_path / "file" / "run")
    assert (done.code, "is a file" in done.err, done.out) == (2, True, "")
