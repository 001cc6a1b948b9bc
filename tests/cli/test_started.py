"""Adapters whose start is a part of the weights, from the command line: trained, resumed, talked to and merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from trimtab.core.quantized import quantized_modules
from trimtab.train.interrupt import Stopped
from trimtab.train.prepare import prepare
from trimtab.train.recipe import recipe_from
from trimtab.train.reporter import Reporter
from trimtab.train.run import resume, tune
from trimtab.train.rundir import open_run

SHORT = ["--steps", "6", "--learning-rate", "1e-2", "--rank", "4", "--json"]


def test_loftq_from_a_data_file_to_a_plain_model(
    trimtab: Callable[..., Any], chat_model: Path, prompts: Path, tmp_path: Path
) -> None:
    model = ["--model", chat_model, "--data", prompts]
    done = trimtab(
        "tune", *model, *SHORT, "--method", "loftq", "--quantize", "nf4", "--where", "q, v", "--output", "run"
    )
    assert done.code == 0, done.err
    assert done.document["after"]["loss"] < done.document["before"]["loss"]
    run = open_run("run")
    trained = prepare(run.recipe, Reporter(), tmp_path / "again").model
    loaded, _ = run.load()
    mine, its = (dict(quantized_modules(one)) for one in (trained, loaded))
    assert mine.keys() == its.keys()
    kinds = {path: type(module.code.format).__name__ for path, module in its.items()}  # type: ignore[union-attr]
    assert {path.rsplit(".", 1)[-1] for path, kind in kinds.items() if kind == "SVDQuant"} == {"q_proj", "v_proj"}
    assert {path.rsplit(".", 1)[-1] for path, kind in kinds.items() if kind == "NF4"} >= {"k_proj", "down_proj"}
    for path, module in mine.items():
        for name, tensor in module.code.tensors().items():  # type: ignore[union-attr,operator]
            assert torch.equal(tensor, its[path].code.tensors()[name]), (path, name)  # type: ignore[union-attr,operator]
    assert trimtab("chat", "run", "--prompt", "say red cat", "--base", "--max-new-tokens", "3").code == 0
    merged = trimtab("merge", "run", "--out", "merged", "--json")
    assert merged.code == 0, merged.err
    assert merged.document["equal"]
    alone = trimtab("merge", "run/adapter", "--model", chat_model, "--out", "other", "--json")
    assert alone.code == 0, alone.err
    assert alone.document["equal"]


@pytest.mark.parametrize("method", ["pissa", "lora-ga", "lq-lora"])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    method: str, chat_model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {"model": str(chat_model), "data": str(prompts), "method": method, "rank": 4, "steps": 4}
    values |= {"quantize": "nf4"} if method != "lora-ga" else {}
    whole = tune(recipe_from(values | {"output": "whole"}))

    class Stop(Reporter):
        def step(self, line: Any) -> None:
            if line["step"] == 2:
                raise Stopped("here")

    with pytest.raises(Stopped):
        tune(recipe_from(values | {"output": "parts", "save_every": 1}), Stop())
    parts = resume("parts")
    assert parts.after == whole.after
    files = [Path(name) / "adapter" / "adapter.safetensors" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_loftq_without_a_format_says_what_to_do(trimtab: Callable[..., Any], chat_model: Path, prompts: Path) -> None:
    done = trimtab("tune", "--model", chat_model, "--data", prompts, "--method", "loftq")
    assert done.code == 2
    assert "--quantize nf4" in done.err


@pytest.mark.slow
def test_svdquant_from_a_data_file_to_a_plain_model(
    trimtab: Callable[..., Any], chat_model: Path, prompts: Path, tmp_path: Path
) -> None:
    model = ["--model", chat_model, "--data", prompts]
    done = trimtab("tune", *model, *SHORT, "--method", "lora", "--quantize", "svdquant", "--output", "run")
    assert done.code == 0, done.err
    assert done.document["after"]["loss"] < done.document["before"]["loss"]
    loaded, _ = open_run("run").load()
    kinds = {type(module.code.format).__name__ for _, module in quantized_modules(loaded)}  # type: ignore[union-attr]
    assert kinds == {"SVDQuant"}
    merged = trimtab("merge", "run", "--out", "merged", "--json")
    assert merged.code == 0, merged.err
    assert merged.document["equal"]


@pytest.mark.parametrize("start", ["rows", "text"])
@pytest.mark.parametrize("method", ["prefix_tuning", "pre_layer"])
def test_a_prefix_from_activations_is_trained_and_read_back(
    trimtab: Callable[..., Any], chat_model: Path, prompts: Path, method: str, start: str
) -> None:
    settings = ["--start", start, "--length", "3"] + (["--text", "red blue"] if start == "text" else [])
    settings += ["--hidden", "none"] if method == "prefix_tuning" else []
    row = ["--steps", "1", "--learning-rate", "1e-12", "--dtype", "float32", "--json"]
    done = trimtab(
        "tune", "--model", chat_model, "--data", prompts, "--method", method, *settings, *row, "--output", "a"
    )
    assert done.code == 0, done.err
    loaded, tokenizer = open_run("a").load("cpu")
    learned = {name: one for name, one in loaded.named_parameters() if name.endswith(".P")}
    plain = tt.detach(loaded)
    words = "red blue" if start == "text" else "<|im_start|>user\nsay"
    ids = tokenizer(words, add_special_tokens=False, return_tensors="pt")["input_ids"]
    where = "k, v" if method == "prefix_tuning" else "embed, block, !block@-1"
    measured = tt.activations(plain, [{"input_ids": ids}], where)
    assert len(learned) == len(measured)
    for (name, P), (site, wanted) in zip(learned.items(), measured.items(), strict=True):
        assert name.startswith(site), "both are in the order of the model"
        order = torch.arange(3) % len(wanted)
        torch.testing.assert_close(P.float(), wanted[order], rtol=1e-4, atol=1e-5)
