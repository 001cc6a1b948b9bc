"""`trimtab verify` holds for what is right, and each of its checks fails for what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.conftest import WORDS, save_model, write_rows

from trimtab.train import verify as module
from trimtab.train.recipe import Recipe, recipe_from
from trimtab.train.verify import Check, verify


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny", chat=True)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = [
        {"prompt": "say " + " ".join(WORDS[: 1 + at % 4]), "completion": " ".join(WORDS[at % 5 : 3 + at % 7])}
        for at in range(12)
    ]
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", found)


def recipe(model: Path, rows: Path, **more: Any) -> Recipe:
    return recipe_from({"model": str(model), "data": str(rows), "heldout": "2", "device": "cpu", **more})


def failed(found: list[Check]) -> list[str]:
    return [one.name for one in found if one.passed is False]


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "houlsby", "loreft", "prefix_tuning", "vera", "full"])
def test_a_right_recipe_passes(model: Path, rows: Path, method: str) -> None:
    found = verify(recipe(model, rows, method=method))
    assert failed(found) == []
    assert sum(one.passed is True for one in found) >= 8


def test_dropout_does_not_disturb_the_comparison(model: Path, rows: Path) -> None:
    assert failed(verify(recipe(model, rows, method="lora", dropout=0.5))) == []


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_nor_does_that_of_the_model(tmp_path: Path, rows: Path, architecture: str) -> None:
    """BERT drops states and attention by 0.1 of its own; LLaMA's attention keeps its rate as a number."""
    where = save_model(tmp_path / "tiny", chat=architecture == "llama", architecture=architecture)
    if architecture == "llama":
        config = json.loads((where / "config.json").read_text())
        (where / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.3}))
    else:
        rows = write_rows(tmp_path / "labels.jsonl", [{"text": word, "label": word[0] < "g"} for word in WORDS])
    found = verify(recipe(where, rows, method="lora"))
    assert failed(found) == []
    assert sum(one.name.startswith("checkpointed") for one in found) == 4


@pytest.mark.slow
def test_compiled_blocks_are_compared_too(model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = verify(recipe(model, rows, method="lora", compile="blocks", dtype="float32"))
    assert failed(found) == []
    assert [one.passed for one in found if one.name == "compiled = alone"] == [True]


def test_a_quantized_base_passes(model: Path, rows: Path) -> None:
    found = verify(recipe(model, rows, method="lora", quantize="absmax"))
    assert failed(found) == []
    assert [one.name for one in found if one.passed is None] == ["merged = unmerged"]


ROUNDED = "as the run has them, in bfloat16 = alone"


@pytest.mark.parametrize("method", ["lora", "full", "houlsby"])
def test_a_model_of_half_precision_is_compared_in_a_wide_one(model: Path, rows: Path, method: str) -> None:
    found = {one.name: one for one in verify(recipe(model, rows, method=method, dtype="bfloat16"))}
    assert failed(list(found.values())) == []
    exact = [one for name, one in found.items() if name.endswith("= alone") and name != ROUNDED]
    assert {one.bound for one in exact} == {1e-5}
    assert 0 < max(one.measured or 0.0 for one in exact) < 1e-6
    assert found["merged = unmerged"].bound == (None if method == "houlsby" else 1e-4)
    rounded = found[ROUNDED]
    assert rounded.measured is not None
    assert rounded.bound is not None
    assert 1e-4 < rounded.measured <= rounded.bound < 0.5


def test_rounding_larger_than_the_bound_is_no_fault(model: Path, rows: Path, tmp_path: Path) -> None:
    """As in SmolLM2, whose gradients in float32 are off by 6e-5 of themselves, row by row."""
    from safetensors.torch import load_file, save_file

    steep = shutil.copytree(model, tmp_path / "steep")
    weights = load_file(steep / "model.safetensors")
    weights = {name: value * (100 if "q_proj" in name or "k_proj" in name else 1) for name, value in weights.items()}
    save_file(weights, steep / "model.safetensors", {"format": "pt"})
    found = {one.name: one for one in verify(recipe(steep, rows, method="lora", dtype="float32"))}
    assert failed(list(found.values())) == []
    rounded = found["as the run has them, in float32 = alone"]
    assert rounded.measured is not None
    assert rounded.measured > 1e-5


def test_without_room_for_that_its_own_rounding_is_the_bound(
    model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.engine.precision.host_memory", lambda: 1e3)
    found = verify(recipe(model, rows, method="lora", dtype="bfloat16"))
    assert failed(found) == []
    assert ROUNDED not in [one.name for one in found]
    assert {one.bound for one in found if one.name == "packed = alone"} == {8 * torch.finfo(torch.bfloat16).eps}


def test_a_run_that_goes_wrong_in_half_precision_only_is_found_out(
    model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = module.Job.together

    monkeypatch.setattr(module.Job, "together", lambda self, chosen: plain(self, chosen[1:]))
    assert failed(verify(recipe(model, rows, method="lora", dtype="bfloat16"))) == [ROUNDED]


def wrong_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of means: every batch divided by its own count."""
    plain = module.terms_of
    monkeypatch.setattr(module, "terms_of", lambda batch: plain(batch) / 2 if isinstance(batch, dict) else plain(batch))


def leaking_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed rows that see each other."""
    from trimtab.data.packing import Pack, Segment

    plain = module.pack

    def joined(rows: Any, share: Any, ends: Any) -> Pack:
        made = plain(rows, share, ends)
        return Pack(**{**vars(made), "segments": (Segment(0, made.ids.shape[1]),)})

    monkeypatch.setattr(module, "pack", joined)


def step_on_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that also changes a frozen weight."""
    plain = module.loss_sum

    def heavy(model: Any, batch: Any, task: str) -> Any:
        with torch.no_grad():
            model.model.norm._parameters["weight"] += 1e-3
        return plain(model, batch, task)

    monkeypatch.setattr(module, "loss_sum", heavy)


def lossy_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in half precision."""
    plain = module.load

    def rounded(model: Any, path: Path) -> Any:
        done = plain(model, path)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(parameter.half())
        return done

    monkeypatch.setattr(module, "load", rounded)


def wrong_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge that does nothing."""
    monkeypatch.setattr(module, "merge", module.detach)


def wrong_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpointing that changes the gradients."""
    plain = module.in_training

    def doubled(*given: Any, **more: Any) -> Any:
        return {name: 2 * value for name, value in plain(*given, **more).items()}

    monkeypatch.setattr(module, "in_training", doubled)


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        (wrong_terms, "packed = alone"),
        (leaking_attention, "packed = alone"),
        (step_on_the_base, "a step leaves the base as it was"),
        (lossy_file, "saved and loaded, the same bits"),
        (wrong_merge, "merged = unmerged"),
        (wrong_chunks, "checkpointed (sqrt) = alone"),
    ],
)
def test_every_check_can_fail(
    model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., None], check: str
) -> None:
    fault(monkeypatch)
    assert check in failed(verify(recipe(model, rows, method="lora")))


def test_a_loss_mask_that_disagrees_with_the_data_fails(
    model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = module.collate

    def everything(chosen: Any, pad_id: int) -> Any:
        batch = plain(chosen, pad_id)
        return {**batch, "labels": batch["input_ids"]}

    monkeypatch.setattr(module, "collate", everything)
    assert "the loss counts the trained tokens" in failed(verify(recipe(model, rows, method="lora")))
