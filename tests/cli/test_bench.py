"""`trimtab bench`: three kinds of timing, from a model or a bare config, and bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.cli.conftest import save_model


def test_latency_switch_and_mixed(trimtab: Any, chat_model: Path, tmp_path: Path) -> None:
    shape = tmp_path / "shape"
    shape.mkdir()
    shutil.copy(chat_model / "config.json", shape / "config.json")
    small = ["--batch", "2", "--length", "4", "--rounds", "2"]
    told = trimtab("bench", "latency", "--model", shape / "config.json", "--methods", "lora,houlsby", *small,
                   "--out", tmp_path / "told.json")  # fmt: skip
    assert told.code == 0, told.err
    assert "houlsby" in told.out
    document = json.loads((tmp_path / "told.json").read_text())
    assert [one["name"] for one in document["cells"][0]["timed"]] == ["base", "lora", "houlsby"]
    assert document["conditions"]["rounds"] == 2
    assert document["conditions"]["interval"].startswith("none")  # two rounds give no interval of 95 %
    switch = trimtab("bench", "switch", "--model", chat_model, "--adapters", "2", "--rounds", "2", "--json").document
    assert switch["saved_bytes"] > 0
    assert {one["name"] for one in switch["timed"]} == {"loaded already", "from disk"}
    mixed = trimtab("bench", "mixed", "--model", chat_model, *small)
    assert mixed.code == 0, mixed.err
    assert "times the rows a second of one for all" in mixed.out


def test_settings_presets_and_models_that_only_read(trimtab: Any, tmp_path: Path) -> None:
    asked = "houlsby:bottleneck=2,prefix,lora:quantize=nf4+rank=2"
    for architecture in ("bert", "t5"):
        model = save_model(tmp_path / architecture, chat=False, architecture=architecture)
        for source in (model, model / "config.json"):
            small = ["--batch", "2", "--length", "4", "--rounds", "1", "--methods", asked, "--json"]
            told = trimtab("bench", "latency", "--model", source, *small).document
            assert [one["name"] for one in told["cells"][0]["timed"]] == ["base", *asked.split(",")]
        outcome = trimtab("bench", "latency", "--model", model, "--length", "4", "--batch", "1", "--job", "step")
        assert outcome.code == 2
        assert "no next token" in outcome.err


def test_what_cannot_be_timed_is_refused(trimtab: Any, chat_model: Path, tmp_path: Path) -> None:
    for bad, word in (
        (["latency", "--model", chat_model, "--batch", "0"], "no whole numbers above zero"),
        (["latency", "--model", chat_model, "--methods", ","], "names none"),
        (["latency", "--model", chat_model, "--methods", "lara"], "lora"),
        (["latency", "--model", chat_model, "--methods", "lora:rnk=2"], "no setting of lora"),
        (["mixed", "--model", chat_model, "--methods", "lora,dora"], "it takes one"),
        (["mixed", "--model", chat_model, "--batch", "1"], "cannot differ"),
        (["latency", "--model", chat_model, "--length", "129"], "--length 128"),
        (["latency", "--model", chat_model / "config.json", "--dtype", "float99"], "float32"),
        (["latency", "--model", chat_model / "config.json", "--device", "quantum"], "cannot be used"),
        (["latency", "--model", chat_model, "--out", tmp_path], "is a folder"),
        (["latency", "--model", tmp_path / "none" / "config.json"], "none"),
        (["latency", "--model", chat_model, "--out", tmp_path / "no" / "x.json"], "no such folder"),
        (["speed", "--model", chat_model], "latency"),
    ):
        outcome = trimtab("bench", *bad)
        assert outcome.code == 2, bad
        assert word in outcome.err, outcome.err
