"""Every kind of run has a prediction: padded batches, and methods inside the attention too."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.cli.conftest import WORDS, save_model, write_rows

from trimtab.plan.of_run import predicted
from trimtab.train.prepare import prepare
from trimtab.train.recipe import Recipe, recipe_from
from trimtab.train.reporter import Reporter

METHODS = ("lora", "prefix_tuning", "prompt_tuning", "llama_adapter", "loreft")


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("runs")
    rows = [
        {"prompt": f"say {one} {two}", "completion": " ".join([two] * (1 + len(one) % 4))}
        for one in WORDS[:5]
        for two in WORDS[6:11]
    ]
    data = write_rows(folder / "rows.jsonl", rows)
    return {"model": str(save_model(folder / "tiny", chat=True)), "data": str(data), "dtype": "float32"}


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["auto", "off"])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_has_a_prediction(method: str, packing: str, values: dict[str, Any], tmp_path: Path) -> None:
    job = prepare(
        recipe_from({**values, "method": method, "packing": packing, "output": str(tmp_path / "run")}), Reporter()
    )
    found = predicted(job)
    assert "reason" not in found
    assert found["predicted"]["activations"] > 0


def test_what_compiled_blocks_keep_is_not_predicted() -> None:
    job = SimpleNamespace(recipe=Recipe(model="m", data="d", compile="blocks"))
    assert predicted(job) == {"predicted_bytes": None, "reason": "what compiled blocks keep is the compiler's choice"}
