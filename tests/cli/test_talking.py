"""`trimtab chat` with several runs: switching in mid-talk, and the untuned model's answer in a column beside."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import trimtab.cli.chat as chatting
from trimtab.cli.main import main

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, chat_model: Path, prompts: Path) -> Path:
    folder = tmp_path_factory.mktemp("more") / "other"
    arguments = ["tune", "--model", chat_model, "--data", prompts, "--steps", "12", "--learning-rate", "3e-2"]
    assert main([*map(str, arguments), "--method", "ia3", "--seed", "4", "--output", str(folder), "--json"]) == 0
    return folder


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Somebody at a terminal who types these lines."""

    def put(*lines: str) -> None:
        coming: Iterator[str] = iter(lines)
        monkeypatch.setattr("builtins.input", lambda prompt="": next(coming))
        monkeypatch.setattr(chatting.sys.stdin, "isatty", lambda: True, raising=False)

    return put


def answer(trimtab: Run, run: Path) -> str:
    found = trimtab("chat", run, "--prompt", "say red dog", "--max-new-tokens", "8", "--json").document
    return str(found["answer"])


def test_another_run_goes_on_with_the_talk(
    trimtab: Run, runs: dict[str, Path], other: Path, typed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = {"chat": answer(trimtab, runs["chat"]), "other": answer(trimtab, other)}
    assert alone["chat"] != alone["other"]
    asked: list[tuple[str, int]] = []
    real = chatting.Talk.prompt_ids

    def spy(self: Any, text: str, history: list[Any]) -> list[int]:
        asked.append((self.name, len(history)))
        return real(self, text, history)

    monkeypatch.setattr(chatting.Talk, "prompt_ids", spy)
    say = "say red dog"
    typed(say, "/adapter other", say, "/reset", say, "/adapter oter", "/adapter", "/base", say, "/help", "/quit")
    done = trimtab("chat", runs["chat"], other, "--max-new-tokens", "8")
    assert (done.code, done.err) == (0, "")
    assert asked == [("chat", 0), ("other", 2), ("other", 0), ("other", 0), ("other", 2)]
    assert f"chat> {alone['chat']}" in done.out
    assert f"other> {alone['other']}" in done.out
    assert "no adapter 'oter'; here: chat, other" in done.out
    assert "  chat\n* other\n" in done.out
    assert done.out.count("/adapter NAME") == 2


def test_both_shows_columns_and_remembers_the_tuned_answer(
    trimtab: Run, runs: dict[str, Path], typed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "83")
    arguments = ("chat", runs["chat"], "--max-new-tokens", "8")
    plain = trimtab(*arguments, "--base", "--prompt", "say red dog", "--json").document
    assert trimtab(*arguments, "--side-by-side", "--prompt", "say red dog", "--json").document == plain
    kept: list[str] = []
    real = chatting.Talk.answer

    def spy(self: Any, text: str, *, remember: bool = True) -> Any:
        yield from real(self, text, remember=remember)
        kept.append(self.history[-1]["content"] if self.history else "")

    monkeypatch.setattr(chatting.Talk, "answer", spy)
    typed("/both", "say red dog", "/both", "say blue cat", "/quit")
    out = trimtab(*arguments).out
    rows = [line for line in out.splitlines() if line[40:43] == " │ " or line.endswith(" │")]
    assert rows[0].split() == ["untuned", "│", "chat"]
    left, right = ("".join("".join(row.partition("│")[side].split()) for row in rows[1:]) for side in (0, 2))
    assert left == "".join(plain["base"].split())
    assert right == "".join(plain["answer"].split())
    assert kept[1] == plain["answer"]
    assert "beside" in out
    assert "alone" in out


def test_long_answers_are_wrapped_and_keep_their_lines() -> None:
    assert chatting.wrapped("a b\n\nccc", 3) == ["a b", "", "ccc"]
    assert chatting.wrapped("aaaa bb", 4) == ["aaaa", "bb"]


def test_runs_that_cannot_share_a_model_say_why(
    trimtab: Run, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for first, second, told in (
        ("chat", "plain", "its tokenizer or chat template is not the one"),
        ("chat", "quantized", "its quantize is nf4, not"),
        ("chat", "classes", "its task is classify, not causal"),
        ("chat", "chat", "two runs are called chat"),
    ):
        done = trimtab("chat", runs[first], runs[second], "--prompt", "x")
        assert (done.code, told in done.err) == (2, True), done.err
    assert trimtab("chat", "--prompt", "x").code == 2


def test_lines_from_a_pipe_are_answered_by_the_first_run(
    trimtab: Run, runs: dict[str, Path], other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("say red dog\n/adapter other\n"))
    found = trimtab("chat", runs["chat"], other, "--max-new-tokens", "8", "--json").document
    assert [one["prompt"] for one in found] == ["say red dog", "/adapter other"]
    assert found[0]["answer"] == answer(trimtab, runs["chat"])
