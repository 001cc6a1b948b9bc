"""What can be done with a finished run: inspect, chat, merge."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import save_model

import trimtab.cli.chat as chatting
from trimtab.cli.curve import curve

Run = Callable[..., Any]


@pytest.fixture
def copied(runs: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a run that a test may damage."""
    return lambda name: Path(shutil.copytree(runs[name], tmp_path / "copy"))


# ------------------------------------------------------------------------------------------------------- inspect


def test_inspect_tells_all_about_a_run(trimtab: Run, runs: dict[str, Path]) -> None:
    done = trimtab("inspect", runs["chat"])
    assert (done.code, done.err) == (0, "")
    for words in (
        "(finished)",
        "LlamaForCausalLM",
        "32 training rows, 4 held out",
        "12 steps of 8 rows, learning rate 0.01",
        "lora(rank=4, alpha=16.0, dropout=0.0, start=A, ",
        " at 'all-linear': 14 sites (q 2, k 2, v 2, o 2, gate 2, ",
        "A  4x32  at 12 sites",
        "held out",
        "perplexity",
        "training loss",
        "step 1 to 12",
        "torch ",
        "3,712 of",
    ):
        assert words in done.out


def test_inspect_json_has_recipe_record_and_adapter(trimtab: Run, runs: dict[str, Path]) -> None:
    found = trimtab("inspect", runs["chat"], "--json").document
    assert (found["kind"], found["status"], found["steps_done"]) == ("run", "finished", 12)
    assert found["recipe"]["learning_rate"] == 0.01
    (part,) = found["adapter"]["parts"]
    assert part["values"] == found["trainable"] == 3712
    assert {"name": "B", "shape": [16, 4], "count": 4} in part["tensors"]
    assert found["adapter"]["bytes"] > 4 * 3712


def test_inspect_reads_an_adapter_alone_and_every_part_of_a_classifier(trimtab: Run, runs: dict[str, Path]) -> None:
    assert trimtab("inspect", runs["chat"] / "adapter", "--json").document["kind"] == "adapter"
    done = trimtab("inspect", runs["classes"])
    assert "full() at 'classifier': 1 site (head 1)" in done.out
    assert "accuracy" in done.out
    shared = trimtab("inspect", runs["plain"])
    assert "prefix_tuning(length=4" in shared.out
    assert "P" in shared.out
    assert "@shared.E" not in shared.out  # the network that made the prefixes stays behind


def test_inspect_imports_no_transformers(runs: dict[str, Path], source_environment: dict[str, str]) -> None:
    code = (
        f"import sys; from trimtab.cli.main import main; main(['inspect', {str(runs['chat'])!r}]); "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], env=source_environment, check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "run.json").write_text("{"), "cannot be read as a run"),
        (lambda run: (run / "run.json").write_text("[]"), "damaged"),
        (lambda run: (run / "recipe.yaml").unlink(), "recipe.yaml missing"),
        (lambda run: (run / "adapter/adapter.safetensors").unlink(), "adapter.safetensors cannot be read"),
        (lambda run: (run / "adapter/adapter.safetensors").write_bytes(b"12345678"), "cannot be read"),
        (lambda run: (run / "adapter/adapter.json").write_text("{}"), "is not the record of a trimtab adapter"),
        (
            lambda run: (run / "adapter/adapter.json").write_text('{"format": "trimtab-adapter"}'),
            "is damaged: KeyError",
        ),
    ],
)
def test_inspect_says_what_is_damaged(trimtab: Run, copied: Any, damage: Callable[[Path], None], message: str) -> None:
    run = copied("chat")
    damage(run)
    done = trimtab("inspect", run)
    assert done.code == 2, done.out
    assert message in done.err
    assert "Traceback" not in done.err


def test_inspect_shows_an_unfinished_run(trimtab: Run, copied: Any) -> None:
    run = copied("chat")
    shutil.rmtree(run / "adapter")
    record = json.loads((run / "run.json").read_text()) | {"status": "running"}
    for key in ("after", "seconds"):
        del record[key]
    (run / "run.json").write_text(json.dumps(record))
    done = trimtab("inspect", run)
    assert done.code == 0, done.err
    assert "no adapter: the run is running" in done.out
    assert trimtab("chat", run, "--prompt", "x").err.startswith(
        f"error: chat: {run} has no adapter: the run is running"
    )


def test_inspect_of_something_else_says_what_it_is(
    trimtab: Run, runs: dict[str, Path], chat_model: Path, tmp_path: Path
) -> None:
    assert "is a model, not a run or an adapter" in trimtab("inspect", chat_model).err
    assert f"nearby: {runs['chat']}" in trimtab("inspect", runs["chat"].parent).err
    assert "does not exist" in trimtab("inspect", "nosuch").err
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    assert "PEFT adapter" in trimtab("inspect", tmp_path / "peft").err
    assert trimtab("inspect", runs["chat"] / "run.json").code == 2


def test_a_curve_of_many_of_one_and_of_no_numbers() -> None:
    many = curve([1 / (1 + n) for n in range(1000)]).splitlines()
    assert len(many) == 10
    assert all(len(line) <= 75 for line in many)
    assert many[-1].strip() == "step 1 to 1000"
    assert "*" in curve([2.0])
    assert "nothing" in curve([float("nan")])


# ---------------------------------------------------------------------------------------------------------- chat


def answer_in_python(run: Path, prompt: str, count: int, adapter: str | None = "default") -> str:
    from trimtab.core.attach import activate
    from trimtab.data.examples import PromptCompletion
    from trimtab.data.wording import inference_prompt
    from trimtab.evaluate.generate import generate
    from trimtab.train.rundir import open_run

    model, tokenizer = open_run(run).load()
    activate(model, adapter)
    return generate(model, tokenizer, [inference_prompt(PromptCompletion(prompt, ""), tokenizer)], count)[0]


@pytest.mark.parametrize("name", ["chat", "plain", "quantized"])
def test_chat_answers_once_as_the_library_does(trimtab: Run, runs: dict[str, Path], name: str) -> None:
    done = trimtab("chat", runs[name], "--prompt", "say red dog", "--max-new-tokens", "10", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.document == {"prompt": "say red dog", "answer": answer_in_python(runs[name], "say red dog", 10)}
    assert trimtab("chat", runs[name], "--prompt", "say red dog", "--max-new-tokens", "10").out.rstrip(
        "\n"
    ) == done.document["answer"].rstrip("\n")


def test_chat_shows_the_untuned_model_beside(trimtab: Run, runs: dict[str, Path]) -> None:
    found = trimtab(
        "chat", runs["chat"], "--prompt", "say red dog", "--base", "--max-new-tokens", "10", "--json"
    ).document
    assert found["base"] == answer_in_python(runs["chat"], "say red dog", 10, None)
    assert found["answer"] != found["base"]
    text = trimtab("chat", runs["chat"], "--prompt", "say red dog", "--base", "--max-new-tokens", "10").out
    assert text.index("untuned> ") < text.index("tuned> ", text.index("untuned> ") + 5)


def test_chat_draws_with_a_seed(trimtab: Run, runs: dict[str, Path]) -> None:
    arguments = [
        "chat",
        runs["chat"],
        "--prompt",
        "say red dog",
        "--temperature",
        "2",
        "--max-new-tokens",
        "12",
        "--json",
    ]
    one, two, three = (trimtab(*arguments, "--seed", seed).document["answer"] for seed in ("1", "1", "2"))
    assert one == two != three


def test_chat_answers_every_line_of_standard_input(
    trimtab: Run, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("say red dog\n\nsay blue cat\nsay red dog"))
    found = trimtab("chat", runs["chat"], "--max-new-tokens", "6", "--json").document
    assert [one["prompt"] for one in found] == ["say red dog", "say blue cat", "say red dog"]
    assert found[0] == found[2]


def test_chat_with_a_classifier_gives_label_and_probabilities(trimtab: Run, runs: dict[str, Path]) -> None:
    found = trimtab("chat", runs["classes"], "--prompt", "red cat", "--json").document
    assert set(found["probabilities"]) == {"colour", "other"}
    assert sum(found["probabilities"].values()) == pytest.approx(1)
    assert found["label"] == max(found["probabilities"], key=found["probabilities"].get)
    text = trimtab("chat", runs["classes"], "--prompt", "red cat").out
    assert text.startswith(found["label"])
    assert "%  other" in text
    assert isinstance(trimtab("chat", runs["numbers"], "--prompt", "red cat", "--json").document["value"], float)


def test_chat_refuses_what_cannot_be(trimtab: Run, runs: dict[str, Path], chat_model: Path) -> None:
    assert "is not a run directory" in trimtab("chat", chat_model, "--prompt", "x").err
    assert "the prompt is empty" in trimtab("chat", runs["chat"], "--prompt", " ").err
    assert "no system prompt" in trimtab("chat", runs["plain"], "--prompt", "x", "--system", "y").err
    assert trimtab("chat", runs["chat"], "--temperature", "-1").code == 2
    done = trimtab("chat", runs["plain"], "--prompt", "word " * 200)
    assert done.code == 2
    assert "tokens" in done.err


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Somebody at a terminal who types these lines."""

    def put(*lines: str | type[BaseException]) -> None:
        typed: Iterator[Any] = iter([*lines, EOFError])

        def read(prompt: str = "") -> str:
            line = next(typed)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(chatting.sys.stdin, "isatty", lambda: True, raising=False)

    return put


def test_a_talk_in_a_terminal_remembers_forgets_and_compares(
    trimtab: Run, runs: dict[str, Path], terminal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []
    real = chatting.Talk.prompt_ids

    def spy(self: Any, text: str, history: list[Any]) -> list[int]:
        asked.append((text, len(history)))
        return real(self, text, history)

    monkeypatch.setattr(chatting.Talk, "prompt_ids", spy)
    terminal(
        "say red dog", "say blue cat", "/base", "and", "/reset", "say red dog", "/help", "", "/quit", "never asked"
    )
    done = trimtab("chat", runs["chat"], "--max-new-tokens", "3")
    assert done.code == 0, done.err
    assert asked == [("say red dog", 0), ("say blue cat", 2), ("say blue cat", 2), ("and", 4), ("say red dog", 0)]
    assert done.out.count("untuned> ") == 1
    assert "forgotten" in done.out


def test_ctrl_c_cuts_an_answer_short_and_keeps_the_talk(
    trimtab: Run, runs: dict[str, Path], terminal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trimtab.evaluate.generate as generation

    real = generation.stream

    def interrupted(*arguments: Any) -> Iterator[str]:
        if not calls:
            calls.append(1)
            raise KeyboardInterrupt
        yield from real(*arguments)

    calls: list[int] = []
    monkeypatch.setattr(generation, "stream", interrupted)
    terminal("say red dog", "say red dog", KeyboardInterrupt)
    done = trimtab("chat", runs["chat"], "--max-new-tokens", "3")
    assert done.code == 0
    assert "(cut short)" in done.out
    assert done.out.count("model> ") == 2


def test_a_long_talk_drops_its_oldest_turns(runs: dict[str, Path]) -> None:
    from trimtab.train.rundir import open_run

    run = open_run(runs["chat"])
    talk = chatting.Talk(*run.load(), run.record, 16, 0.0, None)
    for number in range(12):
        list(talk.answer(f"say red dog {number}"))
    assert len(talk.history) < 24
    assert talk.history[0]["role"] == "user"
    assert len(talk.prompt_ids("say red", talk.history)) <= 128 - 16


# --------------------------------------------------------------------------------------------------------- merge


@pytest.mark.parametrize("name", ["chat", "quantized"])
def test_merge_makes_a_plain_model_that_answers_the_same(
    trimtab: Run, runs: dict[str, Path], tmp_path: Path, name: str
) -> None:
    import transformers

    done = trimtab("merge", runs[name], "--out", tmp_path / "merged", "--json")
    assert done.code == 0, done.err
    assert done.document["equal"] is True
    assert done.document["largest_log_probability_difference"] < 1e-4
    assert done.document["compared_on"] == "4 rows of the run's data"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "say red dog"}], add_generation_prompt=True, return_tensors="pt"
    )
    ids = ids if not hasattr(ids, "input_ids") else ids["input_ids"]
    out = model.generate(ids, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(out, skip_special_tokens=True) == answer_in_python(runs[name], "say red dog", 10)
    assert not any("trimtab" in file.read_text(errors="ignore") for file in (tmp_path / "merged").glob("*.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_merge_of_a_classifier_keeps_its_labels(trimtab: Run, runs: dict[str, Path], tmp_path: Path) -> None:
    done = trimtab("merge", runs["classes"], "--out", tmp_path / "merged")
    assert done.code == 0, done.err
    assert "log-probabilities differ by" in done.out
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["id2label"] == {"0": "colour", "1": "other"}
    assert trimtab("merge", runs["numbers"], "--out", tmp_path / "numbers").code == 0


def test_merge_takes_an_adapter_inside_a_run_or_one_whose_base_is_named(
    trimtab: Run, runs: dict[str, Path], chat_model: Path, tmp_path: Path
) -> None:
    assert trimtab("merge", runs["chat"] / "adapter", "--out", tmp_path / "one").code == 0
    alone = shutil.copytree(runs["chat"] / "adapter", tmp_path / "alone")
    done = trimtab("merge", alone, "--out", tmp_path / "two")
    assert (done.code, "name it with --model" in done.err) == (2, True)
    done = trimtab(
        "merge", alone, "--out", tmp_path / "two", "--model", save_model(tmp_path / "other", chat=True, seed=1)
    )
    assert "is not the model this adapter was trained on" in done.err
    done = trimtab("merge", alone, "--out", tmp_path / "two", "--model", chat_model, "--json")
    assert done.code == 0, done.err
    assert done.document["compared_on"] == "4 rows of random ids"
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()
    (tmp_path / "classes").mkdir()
    alone = shutil.copytree(runs["classes"] / "adapter", tmp_path / "classes" / "alone")
    assert "classifier" in trimtab("merge", alone, "--out", tmp_path / "three", "--model", chat_model).err


def test_merge_refuses_and_leaves_nothing(
    trimtab: Run, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = trimtab("merge", runs["plain"], "--out", tmp_path / "merged")
    assert done.code == 2
    assert "PrefixTuning of adapter 'default' cannot be merged" in done.err
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    assert "exists and is not an empty directory" in trimtab("merge", runs["chat"], "--out", tmp_path / "taken").err
    assert "Missing option '--out'" in trimtab("merge", runs["chat"]).err
    assert trimtab("merge", "nosuch", "--out", tmp_path / "merged").code == 2

    import transformers

    def full(self: Any, directory: Path) -> None:
        (Path(directory) / "part").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device", str(directory))

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    done = trimtab("merge", runs["chat"], "--out", tmp_path / "merged")
    assert done.code == 2
    assert "the disk is full" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_full_disk_that_the_tensor_writer_finds_is_the_same_message(
    trimtab: Run, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers
    from safetensors import SafetensorError

    def full(self: Any, directory: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    done = trimtab("merge", runs["chat"], "--out", tmp_path / "merged")
    assert (done.code, "the disk is full" in done.err) == (2, True)
    assert os.listdir(tmp_path) == []


def test_a_merge_that_changed_the_model_is_reported(
    trimtab: Run, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    import trimtab.cli.merge as merging

    real = merging.save

    def wrong(model: Any, tokenizer: Any, directory: Path) -> None:
        with torch.no_grad():
            next(model.parameters()).mul_(1.5)
        real(model, tokenizer, directory)

    monkeypatch.setattr(merging, "save", wrong)
    done = trimtab("merge", runs["chat"], "--out", tmp_path / "merged")
    assert "warning: rounding to float32 does not explain so much" in done.out
