"""Frozen blocks below all that trains, computed once for all epochs: the same losses, the same bytes after a stop."""

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
from tests.train.test_resume import At, adapter, losses

import trimtab as tt
from trimtab.core.errors import UserError
from trimtab.engine.bottom import frozen_blocks
from trimtab.train.interrupt import Stopped
from trimtab.train.job import Job
from trimtab.train.prepare import prepare
from trimtab.train.recipe import Recipe, recipe_from
from trimtab.train.reporter import Reporter
from trimtab.train.run import resume, tune

TOP = {
    "toplayers": {"method": "toplayers", "settings": {"layers": 1}},
    "headonly": {"method": "headonly"},
    "lora": {"method": "lora", "where": "q@-1:, v@-1:"},
    "loreft": {"method": "loreft", "where": "block@-1:"},
    "nf4": {"method": "lora", "where": "q@-1:, v@-1:", "quantize": "absmax"},
}


@pytest.fixture
def values(model: Path, rows: Path) -> dict[str, Any]:
    return {"model": str(model), "data": str(rows), "heldout": "4", "batch_size": 3, "epochs": 3, "device": "cpu"}


class Notes(Reporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def kept(notes: Notes) -> bool:
    return any("were computed once" in note for note in notes.notes)


@pytest.mark.parametrize("checkpointing", ["off", "block", "selective", "offload"])
@pytest.mark.parametrize("name", list(TOP))
def test_losses_and_adapters_are_the_same(
    values: dict[str, Any], name: str, checkpointing: str, tmp_path: Path
) -> None:
    found = {}
    for bottom in ("computed", "auto"):
        asked = {**values, **TOP[name], "bottom": bottom, "checkpointing": checkpointing, "dtype": "float32"}
        notes = Notes()
        result = tune(recipe_from({**asked, "output": str(tmp_path / bottom)}), notes)
        assert kept(notes) == (bottom == "auto")
        found[bottom] = losses(result.directory), result.after["loss"]
    assert found["auto"][0] == pytest.approx(found["computed"][0], rel=1e-5)
    assert found["auto"][1] == pytest.approx(found["computed"][1], rel=1e-5)
    assert len(set(found["auto"][0])) > 1


@pytest.mark.parametrize("method", ["headonly", "toplayers"])
def test_labelled_rows_past_the_seam_too(method: str, tmp_path: Path) -> None:
    where = save_model(tmp_path / "bert", chat=False, architecture="bert")
    config = json.loads((where / "config.json").read_text())
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (where / "config.json").write_text(json.dumps(config | quiet))
    rows = [{"text": " ".join(WORDS[: 1 + at % 5]), "label": at % 3 == 0} for at in range(24)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    values = {"model": str(where), "data": str(data), "heldout": "4", "batch_size": 5, "epochs": 3, "device": "cpu"}
    found = []
    for bottom in ("computed", "cached"):
        settings = {"layers": 1} if method == "toplayers" else {}
        asked = recipe_from({**values, "method": method, "settings": settings, "bottom": bottom, "dtype": "float32"})
        found.append(losses(tune(replace(asked, output=str(tmp_path / bottom))).directory))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_stopped_run_ends_with_the_same_bytes(values: dict[str, Any], tmp_path: Path) -> None:
    asked = recipe_from({**values, **TOP["toplayers"], "save_every": 1})
    whole = tune(replace(asked, output=str(tmp_path / "whole"))).directory
    directory = tmp_path / "stopped"
    with pytest.raises(Stopped):
        tune(replace(asked, output=str(directory)), At(4, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    resume(directory)
    assert adapter(directory) == adapter(whole)
    assert losses(directory) == losses(whole)


def prepared(values: dict[str, Any], tmp_path: Path, **more: Any) -> Job:
    recipe: Recipe = recipe_from({**values, "output": str(tmp_path / "run"), **more})
    job = prepare(recipe, Reporter())
    job.directory.mkdir(parents=True)
    return job


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"method": "lora"}, "something trains in the lowest block"),
        ({"method": "prompt_tuning", "settings": {"length": 2}}, "virtual tokens go through it"),
        ({**TOP["toplayers"], "packing": "off"}, "rows are padded"),
        ({**TOP["toplayers"], "checkpointing": "sqrt"}, "sqrt runs blocks in groups"),
        ({"method": "lora", "where": "embed, q@-1:"}, "something is drawn anew or trains below the blocks"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_the_reason(
    values: dict[str, Any], tmp_path: Path, more: dict[str, Any], why: str
) -> None:
    job = prepared(values, tmp_path, bottom="cached", **more)
    with pytest.raises(UserError, match=why), job.running(), job.on_bottom(Reporter()):
        pass


@pytest.mark.parametrize("where", ["layer", "config"])
def test_a_bottom_that_draws_anew_is_computed_anew(values: dict[str, Any], tmp_path: Path, where: str) -> None:
    job = prepared(values, tmp_path, **TOP["toplayers"])
    if where == "layer":
        job.model.model.layers[0].self_attn.attention_dropout = 0.1
    else:
        job.model.config.router_jitter_noise = 0.1
    with job.running(), job.on_bottom(Reporter()):
        assert job.bottom is None


def test_it_pays_only_for_more_than_one_epoch_and_where_there_is_room(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepared({**values, "epochs": 1}, tmp_path, **TOP["toplayers"])
    assert job.no_bottom() == "rows are met once"
    job.steps += 1
    assert job.no_bottom() is None
    size = job.bottom_bytes()
    with job.running(), job.on_bottom(Reporter()):
        assert job.bottom is not None
        assert job.bottom.hidden.nbytes == size
    monkeypatch.setattr("trimtab.train.job.host_memory", lambda: 4 * size - 1)
    assert f"they take {size:,} bytes" in str(job.no_bottom())


def test_all_is_as_before_afterwards(values: dict[str, Any], tmp_path: Path) -> None:
    job = prepared(values, tmp_path, **TOP["toplayers"])
    classes, keys = [type(one) for one in job.model.modules()], [set(vars(one)) for one in job.model.modules()]
    with job.on_bottom(Reporter()):
        assert job.bottom is not None
        batch: Any = job.batch([0, 1])
        assert batch.hidden.shape == (1, batch.ids.shape[1], job.model.config.hidden_size)
    assert job.bottom is None
    assert [type(one) for one in job.model.modules()] == classes
    assert [set(vars(one)) - {"_trimtab_ends_with_head"} for one in job.model.modules()] == keys


def test_frozen_blocks_are_counted_from_the_input() -> None:
    torch.manual_seed(0)
    from tests.engine.test_packing import llama

    model = llama()
    assert frozen_blocks(model) == 0  # a plain model trains everywhere
    assert frozen_blocks(tt.attach(llama(), tt.LoRA(rank=2), where="q@1:")) == 1
    assert frozen_blocks(tt.attach(llama(), tt.LoRA(rank=2), where="head")) == 2
    assert frozen_blocks(tt.attach(llama(), tt.PrefixTuning(length=2), where="k@1:, v@1:")) == 0
