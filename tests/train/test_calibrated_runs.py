"""Runs on a base whose codes were chosen by data: the codes are in the run, which then needs no data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.core.errors import UserError
from trimtab.core.quantized import quantized_modules
from trimtab.storage.gptq import GPTQ
from trimtab.train.base import BASE, calibration_rows, format_of
from trimtab.train.recipe import Recipe, recipe_from
from trimtab.train.reporter import Reporter
from trimtab.train.run import resume, tune
from trimtab.train.rundir import open_run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def own_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(home))


@pytest.fixture
def recipe(model: Path, rows: Path) -> Recipe:
    values: dict[str, Any] = {"model": str(model), "data": str(rows), "method": "lora", "rank": 2, "save_every": 1}
    values |= {"quantize": {"gptq": {"code_bits": 3, "group_size": 8}}, "batch_size": 4, "steps": 6, "heldout": "4"}
    return recipe_from(values | {"device": "cpu", "dtype": "float32"})


class Heard(Reporter):
    """Remembers what it is told, and may stop a run after a step."""

    def __init__(self, stop: int | None = None) -> None:
        self.said: list[str] = []
        self.stop = stop

    def note(self, text: str) -> None:
        self.said.append(text)

    def stage(self, name: str) -> None:
        self.said.append(name)

    def step(self, metrics: Mapping[str, Any]) -> None:
        if metrics["step"] == self.stop:
            raise MemoryError("killed")

    def about(self, words: str) -> bool:
        return any(words in text for text in self.said)


def codes_of(model: Any) -> dict[str, Any]:
    return {path: module.code.tensors() for path, module in quantized_modules(model)}


def logits(directory: Path) -> torch.Tensor:
    model, _ = open_run(directory).load("cpu")
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 15)[None]).logits


def test_a_run_holds_its_base_and_needs_no_data_any_more(
    recipe: Recipe, rows: Path, tmp_path: Path, home: Path
) -> None:
    data = Path(shutil.copy(rows, tmp_path / "rows.jsonl"))
    first, again = Heard(), Heard()
    tune(replace(recipe, data=str(data), output=str(tmp_path / "one")), first)
    assert first.about("calibrating GPTQ on 32 training rows")
    tune(replace(recipe, data=str(data), output=str(tmp_path / "two")), again)
    assert not again.about("calibrating"), "equal rows and settings: the codes are kept"
    data.unlink()
    shutil.rmtree(home / "codes")
    found = logits(tmp_path / "one")
    assert torch.equal(found, logits(tmp_path / "two"))
    loaded, _ = open_run(tmp_path / "one").load("cpu")
    formats = {module.code.format for _, module in quantized_modules(loaded)}  # type: ignore[union-attr]
    assert formats == {GPTQ(3, 8)}
    assert all("lm_head" not in path for path in codes_of(loaded))


def test_a_smoothed_base_is_in_the_run_too(recipe: Recipe, tmp_path: Path) -> None:
    smoothed = {"rank": 2, "smooth": True, "inner": {"affine": {"code_bits": 3, "group_size": 8}}}
    heard = Heard()
    tune(replace(recipe, quantize="svdquant", quantize_settings=smoothed, output=str(tmp_path / "run")), heard)
    assert heard.about("calibrating SVDQuant on 32 training rows")
    loaded, _ = open_run(tmp_path / "run").load("cpu")
    scales = [code["smooth"].float() for code in codes_of(loaded).values()]
    assert any(float((scale - 1).abs().max()) > 0.01 for scale in scales)


def test_a_stopped_run_goes_on_to_the_same_bytes(recipe: Recipe, tmp_path: Path, home: Path) -> None:
    tune(replace(recipe, output=str(tmp_path / "whole")))
    with pytest.raises(MemoryError):
        tune(replace(recipe, output=str(tmp_path / "cut")), Heard(stop=3))
    shutil.rmtree(home / "codes")
    heard = Heard()
    resume(tmp_path / "cut", heard)
    assert not heard.about("calibrating")
    assert heard.about("going on after step 2")
    for name in ("adapter/adapter.safetensors", BASE):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_a_base_without_its_run_is_in_nobodys_way(recipe: Recipe, tmp_path: Path) -> None:
    target = tmp_path / "run"
    target.mkdir()
    (target / BASE).write_bytes(b"half")
    with pytest.raises(UserError, match="cannot be read"):
        tune(replace(recipe, output=str(target)))
    (target / BASE).unlink()
    tune(replace(recipe, output=str(target), steps=1))


def test_a_lost_or_damaged_base_is_said(recipe: Recipe, tmp_path: Path) -> None:
    tune(replace(recipe, output=str(tmp_path / "run"), steps=1))
    path = tmp_path / "run" / BASE
    content = bytearray(path.read_bytes())
    path.unlink()
    with pytest.raises(UserError, match="no file"):
        open_run(tmp_path / "run").load("cpu")
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        open_run(tmp_path / "run").load("cpu")


def test_merging_needs_no_data(recipe: Recipe, rows: Path, tmp_path: Path) -> None:
    from trimtab.cli.main import main

    data = Path(shutil.copy(rows, tmp_path / "rows.jsonl"))
    tune(replace(recipe, data=str(data), output=str(tmp_path / "run")))
    data.unlink()
    assert main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_methods_that_code_the_weights_themselves_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="codes the weights itself"):
        tune(replace(recipe, method="loftq", settings={}, output=str(tmp_path / "run")))


def test_rows_are_chosen_by_the_seed_until_there_are_enough() -> None:
    class Row:
        def __init__(self, number: int) -> None:
            self.ids = [number] * 200

    every: Any = [Row(number) for number in range(500)]
    chosen = calibration_rows(every, 0)
    assert [row.ids for row in chosen] == [row.ids for row in calibration_rows(every, 0)]
    assert [row.ids for row in chosen] != [row.ids for row in calibration_rows(every, 1)]
    assert len(chosen) == 128
    assert len(calibration_rows(every[:50], 0)) == 50


@pytest.mark.parametrize(
    ("said", "made"),
    [
        ({"quantize": "gptq"}, "GPTQ(code_bits=4, group_size=64"),
        (
            {"quantize": "gptq", "quantize_code_bits": 3, "quantize_group_size": "none"},
            "GPTQ(code_bits=3, group_size=None",
        ),
        ({"quantize": {"name": "affine", "code_bits": 2}}, "Affine(code_bits=2"),
        ({"quantize": "nf4-double"}, "NF4(block_size=64, scale=Dynamic8("),
        ({"quantize": "nf4", "quantize_double": "true"}, "NF4(block_size=64, scale=Dynamic8("),
        ({"quantize": {"nf4-double": {"block_size": 128}}}, "NF4(block_size=128, scale=Dynamic8("),
        ({"quantize": {"svdquant": {"rank": 4, "inner": {"affine": {"code_bits": 3}}}}}, "SVDQuant(inner=Affine(code_"),
    ],
)
def test_formats_take_settings(said: dict[str, Any], made: str) -> None:
    recipe = recipe_from({"model": "m", "data": "d", **said})
    assert str(format_of(recipe)).startswith(made)
    assert recipe_from(json.loads(json.dumps(vars(recipe)))) == recipe


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"quantize": "gptq", "quantize_code_bit": 3}, "quantize_code_bit"),
        ({"quantize": "gptk"}, "gptq"),
        ({"quantize": "gptq", "quantize_code_bits": 5}, "code_bits=5"),
        ({"quantize": "gptq", "quantize_code_bits": "many"}, "many"),
    ],
)
def test_wrong_settings_are_said(said: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        format_of(recipe_from({"model": "m", "data": "d", **said}))


def test_served_on_the_codes_of_its_run(recipe: Recipe, model: Path, tmp_path: Path) -> None:
    from trimtab.serve.opening import open_served

    one, other = (tune(replace(recipe, output=str(tmp_path / name), steps=2)).directory for name in ("one", "other"))
    served = open_served(str(model), {"one": one, "other": other}, base_name="tiny")
    wanted, found = codes_of(open_run(one).load("cpu")[0]), codes_of(served.model)
    assert wanted
    assert found.keys() == wanted.keys()
    for path, tensors in found.items():
        assert all(torch.equal(tensor, wanted[path][name]) for name, tensor in tensors.items())
    blob = (other / BASE).read_bytes()
    (other / BASE).unlink()
    (other / BASE).write_bytes(blob + b" ")
    with pytest.raises(UserError, match="these have different ones"):
        open_served(str(model), {"one": one, "other": other}, base_name="tiny")


def test_a_talk_takes_no_run_on_other_codes(recipe: Recipe, tmp_path: Path) -> None:
    from trimtab.cli.talk import Talk

    settings = {"one": {"code_bits": 3, "group_size": 8}, "bits": {"code_bits": 4, "group_size": 8}}
    runs = {
        name: open_run(tune(replace(recipe, output=str(tmp_path / name), steps=1, quantize_settings=own)).directory)
        for name, own in settings.items()
    }
    reseeded = replace(recipe, output=str(tmp_path / "other"), steps=1, seed=1, limit=12)
    runs["other"] = open_run(tune(reseeded).directory)
    talk = Talk(*runs["one"].load("cpu"), runs["one"].record, 4, 0.0, None)
    for name, why in (("bits", "code_bits=4"), ("other", "codes are of another calibration")):
        with pytest.raises(UserError, match=why):
            talk.add(name, runs[name], runs["one"])
    talk.add("again", runs["one"], runs["one"])
    assert "again" in talk.runs
