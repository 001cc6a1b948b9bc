"""Virtual tokens from the command's side: text starts, what is saved, and going on exactly."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.conftest import WORDS, save_model, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import trimtab as tt
from trimtab.core.errors import UserError
from trimtab.train.interrupt import Stopped
from trimtab.train.recipe import Recipe, recipe_from
from trimtab.train.reporter import Reporter
from trimtab.train.run import resume, tune
from trimtab.train.verify import verify


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny", chat=True)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = [{"prompt": f"say {one} {two}", "completion": f"{two} {one}"} for one in WORDS[:5] for two in WORDS[6:10]]
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", found)


def recipe(model: Path, rows: Path, method: str, **more: Any) -> Recipe:
    values: dict[str, Any] = {"model": str(model), "data": str(rows), "method": method, "length": 4, "steps": 6}
    return recipe_from(values | {"batch_size": 4, "heldout": "4", "save_every": 1, "device": "cpu"} | more)


def record(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "adapter" / "adapter.json").read_text())


class StopAt(Reporter):
    def step(self, metrics: Any) -> None:
        if metrics["step"] == 3:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("method", ["prefix_tuning", "p_tuning"])
def test_a_run_keeps_its_network_while_it_goes_on_and_saves_without_it(
    model: Path, rows: Path, method: str, tmp_path: Path
) -> None:
    job = recipe(model, rows, method, hidden=6)
    whole = tune(replace(job, output=str(tmp_path / "whole")))
    assert whole.record["packing"] == "shared"
    with pytest.raises(Stopped):
        tune(replace(job, output=str(tmp_path / "stopped")), StopAt())
    resume(tmp_path / "stopped")
    first, again = (tmp_path / name / "adapter" / "adapter.safetensors" for name in ("whole", "stopped"))
    assert first.read_bytes() == again.read_bytes()
    assert not any("shared" in key or key.endswith((".E", ".O", ".W1")) for key in tensors(first))

    kept = tune(replace(job, output=str(tmp_path / "kept"), bake=False))
    assert kept.after == whole.after
    assert any(key.endswith(".E") for key in tensors(tmp_path / "kept" / "adapter" / "adapter.safetensors"))
    ids = torch.tensor([[5, 6, 7, 8]])
    found = []
    for name in ("whole", "kept"):
        base = AutoModelForCausalLM.from_pretrained(model)
        found.append(tt.load(base, tmp_path / name / "adapter")(input_ids=ids).logits)
    torch.testing.assert_close(*found)


def tensors(path: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return set(file.keys())


def test_a_prompt_starts_as_a_text(model: Path, rows: Path, tmp_path: Path) -> None:
    text = " ".join(WORDS[:2])
    job = recipe(model, rows, "prompt_tuning", start="text", text=text, learning_rate=0.0, weight_decay=0.0)
    result = tune(replace(job, output=str(tmp_path / "run")))
    ids = AutoTokenizer.from_pretrained(model)(text, add_special_tokens=False)["input_ids"]
    assert record(result.directory)["parts"][0]["method"]["tokens"] == ids[:4] or len(ids) > 4
    base = AutoModelForCausalLM.from_pretrained(model)
    table = base.get_input_embeddings().weight.detach().clone()
    loaded = tt.load(base, result.directory / "adapter").get_input_embeddings().delta["default"].P
    known = min(4, len(ids))
    torch.testing.assert_close(loaded[:known], table[ids[:known]], rtol=0, atol=0)
    assert all(any(torch.equal(row, other) for other in table) for row in loaded)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning", "pre_layer", "llama_adapter"])
def test_every_way_of_batching_has_the_gradients_of_rows_alone(model: Path, rows: Path, method: str) -> None:
    checks = verify(recipe(model, rows, method, length=2))
    wrong = [check for check in checks if check.passed is False]
    assert not wrong
    assert any(check.name.startswith("packed with common") and check.passed for check in checks)
    assert sum(check.name.startswith("checkpointed") and bool(check.passed) for check in checks) >= 3


def test_a_search_from_the_command_never_raises_its_loss_and_shows_its_words(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    from trimtab.cli.inspect import read_adapter, text

    result = tune(replace(recipe(model, rows, "auto_prompt", candidates=6, steps=5), output=str(tmp_path / "run")))
    lines = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    assert all(line["loss"] <= line["loss_before"] for line in lines)
    assert any(line["loss"] < line["loss_before"] for line in lines)
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = read_adapter(result.directory / "adapter")
    words = tokenizer.decode(lines[-1]["tokens"])
    assert found["notes"]["prompt"] == words
    assert repr(words) in text({"kind": "adapter", "adapter": found}, [])


def test_a_stopped_search_goes_on_to_the_same_prompt(model: Path, rows: Path, tmp_path: Path) -> None:
    asked = recipe(model, rows, "auto_prompt", candidates=6, steps=6)
    tune(replace(asked, output=str(tmp_path / "whole")))

    class Stopping(Reporter):
        def step(self, metrics: Any) -> None:
            if metrics["step"] == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="stopped after step 3 of 6; trimtab tune --resume"):
        tune(replace(asked, output=str(tmp_path / "stopped")), Stopping())
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    assert len(metrics.read_text().splitlines()) == 3
    metrics.write_text(metrics.read_text() + '{"step": 4, "lo')  # as a kill leaves it
    resume(tmp_path / "stopped")
    both = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "stopped")
    ]
    assert [line["tokens"] for line in both[0]] == [line["tokens"] for line in both[1]]
    assert [line["loss"] for line in both[0]] == [line["loss"] for line in both[1]]
    ours, theirs = ((tmp_path / name / "adapter" / "adapter.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert ours == theirs


def test_virtual_tokens_that_leave_no_room_for_a_text_are_refused(model: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reserves 127 positions, and the model has 128: none is left for a text"):
        tune(recipe(model, rows, "prompt_tuning", length=127, output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
