"""`trimtab plan --gpus N --nodes M`."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def test_tables_a_plot_and_refusals(trimtab: Any, chat_model: Path, tmp_path: Path) -> None:
    asked = ["plan", "--model", chat_model, "--method", "lora", "--batch-size", "16", "--length", "32"]
    many = [*asked, "--fit", "a100", "--gpus", "4", "--nodes", "2"]
    told = trimtab(*many, "--plot", tmp_path / "plot")
    assert told.code == 0, told.err
    assert "advised: shard: none" in told.out
    assert "hybrid" in told.out
    assert (tmp_path / "plot" / "scaling.svg").read_text().startswith("<?xml")
    assert (tmp_path / "plot" / "scaling.png").stat().st_size > 1000
    document = trimtab(*many, "--json").document
    assert [one["shard"] for one in document["layouts"]] == ["none", "hybrid", "full"]
    assert document["layouts"][2]["traffic"]["gathered"] > 0
    for bad, word in (
        ([*asked, "--plot", "x"], "--plot is for several devices"),
        ([*asked, "--fit", "24GB", "--gpus", "2"], "no rates are known of 24GB"),
        ([*many, "--method", "ia3"], "one recipe at a time"),
        ([*many, "--link-bandwidth", "fast"], "no size"),
    ):
        outcome = trimtab(*bad)
        assert outcome.code == 2
        assert word in outcome.err
