"""`trimtab serve` as a user starts it: over runs, with wrong input, ended with Ctrl-C."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import save_model

Run = Callable[..., Any]
pytest.importorskip("starlette")
httpx = pytest.importorskip("httpx")


def test_a_server_over_runs_answers_as_chat_does(
    trimtab: Run, runs: dict[str, Path], chat_model: Path, tmp_path: Path
) -> None:
    wanted = trimtab("chat", runs["chat"], "--prompt", "say red dog", "--base", "--max-new-tokens", "10", "--json")
    command = [sys.executable, "-m", "trimtab", "serve", str(chat_model), "--port", "0", "--name", "tiny"]
    command += ["--adapter", f"mine={runs['chat']}", "--adapter", f"again={runs['chat'] / 'adapter'}"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert "3 models at http://127.0.0.1:" in line, server.stderr.read() if server.stderr else ""
        address = line.split(" at ")[1].split(": ")[0]
        for model, answer in (("mine", "answer"), ("again", "answer"), ("tiny", "base")):
            body = {"model": model, "messages": [{"role": "user", "content": "say red dog"}], "temperature": 0}
            found = httpx.post(f"{address}/chat/completions", json=body | {"max_tokens": 10}, timeout=60).json()
            assert found["choices"][0]["message"]["content"] == wanted.document[answer]
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=20)
        assert (server.returncode, out.splitlines()[-1], err) == (0, "stopped", "")
    finally:
        server.kill()


def test_what_is_wrong_is_told_before_serving(
    trimtab: Run, runs: dict[str, Path], chat_model: Path, tmp_path: Path
) -> None:
    other = save_model(tmp_path / "other", chat=True, seed=3)
    reworded = tmp_path / "reworded"
    shutil.copytree(chat_model, reworded)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        if (reworded / name).is_file():
            text = (reworded / name).read_text()
            (reworded / name).write_text(text.replace("<|im_start|>assistant", "<|im_start|>helper"))
    mine = ("--adapter", f"mine={runs['chat']}")
    cases: list[tuple[list[Any], str]] = [
        ([other, *mine], "mine: trained on another model"),
        ([reworded, *mine], "tokenizer or chat template is not the one"),
        ([chat_model, *mine, "--adapter", f"q={runs['quantized']}"], "q: trained on NF4"),
        ([chat_model, "--quantize", "gptq"], "a base in GPTQ needs the codes of one run, and these have none"),
        ([chat_model, *mine, "--quantize", "nf4"], "mine: trained on dense weights, served on NF4"),
        ([chat_model, "--adapter", "mine"], "is not NAME=DIR"),
        ([chat_model, *mine, *mine], "mine names two adapters"),
        ([chat_model, "--adapter", f"a b={runs['chat']}"], "cannot be a model name"),
        ([chat_model, "--adapter", f"tiny-chat={runs['chat']}"], "tiny-chat names two models"),
        ([chat_model, "--adapter", f"x={tmp_path}"], "neither a run nor an adapter"),
        ([chat_model, "--adapters", tmp_path / "none"], "is not a directory"),
        ([chat_model, "--adapters", chat_model.parent], "there is no run and no adapter"),
        ([chat_model, *mine, "--token", ""], "the token is empty"),
        ([chat_model, *mine, "--host", "192.0.2.1"], "cannot listen at 192.0.2.1"),
        ([tmp_path / "nothing"], "nothing"),
    ]
    for arguments, told in cases:
        done = trimtab("serve", *arguments, "--port", "0")
        assert (done.code, told in done.err) == (2, True), f"{arguments}: {done.err}"
        assert "Traceback" not in done.err


def test_runs_of_one_format_bring_it_along(runs: dict[str, Path], chat_model: Path) -> None:
    from trimtab.core.quantized import quantized_modules
    from trimtab.serve.opening import open_served

    served = open_served(str(chat_model), {"q": runs["quantized"], "again": runs["quantized"]}, base_name="tiny")
    assert list(quantized_modules(served.model))
    assert list(served.names) == ["tiny", "q", "again"]


def test_without_the_extra_one_line_says_what_to_install(
    trimtab: Run, chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "uvicorn" else real(name, *more)
    )
    done = trimtab("serve", chat_model, "--json")
    assert done.code == 2
    assert json.loads(done.out)["fix"] == "pip install 'trimtab[serve]'"
