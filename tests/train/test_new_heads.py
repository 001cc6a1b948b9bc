"""Classifiers: a head that the pretrained model does not have is trained once; rows are packed where that works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import WORDS, save_model, write_rows

from trimtab.train.prepare import prepare
from trimtab.train.recipe import recipe_from
from trimtab.train.reporter import Reporter
from trimtab.train.updates import Updates

HEAD = 32 * 2 + 2


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("heads")
    rows = [{"text": f"{one} cat", "label": "short" if len(one) < 5 else "long"} for one in WORDS]
    data = write_rows(folder / "rows.jsonl", rows)
    return {"model": str(save_model(folder / "bert", chat=False, architecture="bert")), "data": str(data)}


@pytest.mark.parametrize(("settings", "beside"), [({"method": "headonly"}, 0), ({"method": "ia3"}, 2 * (32 + 32 + 48))])
def test_the_head_is_counted_once(values: dict[str, Any], tmp_path: Path, settings: Any, beside: int) -> None:
    job = prepare(recipe_from(values | settings | {"output": str(tmp_path / "run")}), Reporter())
    assert sum(one.numel() for one in job.model.parameters() if one.requires_grad) == HEAD + beside


def test_full_fine_tuning_trains_every_value_once(values: dict[str, Any], tmp_path: Path) -> None:
    settings = {"method": "full", "where": "all", "output": str(tmp_path / "run")}
    job = prepare(recipe_from(values | settings), Reporter())
    trained = sum(one.numel() for one in job.model.parameters() if one.requires_grad)
    assert trained == sum(one.numel() for one in job.model.parameters() if not one.requires_grad)


def test_rows_are_padded_for_a_method_that_needs_torchs_attention(values: dict[str, Any], tmp_path: Path) -> None:
    packings = {}
    for method in ("lora", "llama_adapter"):
        job = prepare(recipe_from(values | {"method": method, "output": str(tmp_path / method)}), Reporter())
        packings[method] = job.packing
        with job.running():
            assert job.measure()["rows"] > 0
    assert packings == {"lora": "plain", "llama_adapter": "off"}


def test_a_head_alone_trains_at_a_rate_of_its_own(values: dict[str, Any], tmp_path: Path) -> None:
    """Full fine-tuning's rate would hardly move it."""
    rates = {}
    for method in ("headonly", "full"):
        rates[method] = prepare(
            recipe_from(values | {"method": method, "output": str(tmp_path / method)}), Reporter()
        ).rate
    assert rates["headonly"] == 0.02
    assert rates["full"] < 0.002


def test_a_new_head_learns_at_the_rate_of_a_presets_first_part(values: dict[str, Any], tmp_path: Path) -> None:
    job = prepare(recipe_from(values | {"method": "unipelt", "output": str(tmp_path / "run")}), Reporter())
    groups = Updates(job.recipe, job.model, job.rate, job.ratios).optimizer.param_groups
    rates = {name: group["lr"] for group in groups for name in group["param_names"]}
    assert {rate for name, rate in rates.items() if name.startswith("classifier")} == {job.rate}
    assert len(set(rates.values())) == 3
