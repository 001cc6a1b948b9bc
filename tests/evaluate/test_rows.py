"""The loss of every row by itself adds up to the loss over all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.conftest import WORDS, save_model, write_rows

from trimtab.evaluate.loss import evaluate
from trimtab.evaluate.rows import each_row
from trimtab.train.prepare import prepare
from trimtab.train.recipe import recipe_from
from trimtab.train.reporter import Reporter


def job(folder: Path, architecture: str, method: str) -> Any:
    rows: list[dict[str, Any]]
    if architecture == "bert":
        rows = [{"text": f"{one} cat", "label": "short" if len(one) < 5 else "long"} for one in WORDS]
    else:
        rows = [{"prompt": f"say {one}", "completion": " ".join(WORDS[: 2 + at % 5])} for at, one in enumerate(WORDS)]
    model = save_model(folder / "model", chat=architecture != "bert", architecture=architecture)
    values = {"model": str(model), "data": str(write_rows(folder / "rows.jsonl", rows)), "dtype": "float32"}
    return prepare(recipe_from(values | {"method": method, "heldout": "7", "output": str(folder / "run")}), Reporter())


@pytest.mark.parametrize(("architecture", "method"), [("llama", "lora"), ("llama", "prompt_tuning"), ("bert", "lora")])
def test_rows_add_up(tmp_path: Path, architecture: str, method: str) -> None:
    made = job(tmp_path, architecture, method)
    with torch.no_grad():
        for parameter in made.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    whole = evaluate(made.model, made.heldout_rows, made.task, made.pad_id, batch_size=3)
    found = each_row(made.model, made.heldout_rows, made.task, made.pad_id, batch_size=3)
    alone = [each_row(made.model, [row], made.task, made.pad_id) for row in made.heldout_rows]
    assert found.loss == pytest.approx(whole["loss"], rel=1e-5)
    assert found.losses == pytest.approx([one.losses[0] for one in alone], rel=1e-4)
    assert found.terms == [one.terms[0] for one in alone]
    assert found.accuracy == whole.get("accuracy")
