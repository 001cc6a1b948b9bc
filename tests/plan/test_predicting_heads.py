"""A run's predicted memory is of the model with the head that it trains."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import WORDS, save_model, write_rows

from trimtab.core.errors import UserError
from trimtab.models.loading import outline
from trimtab.plan.of_run import predicted
from trimtab.plan.planning import unread
from trimtab.train.prepare import prepare
from trimtab.train.recipe import recipe_from
from trimtab.train.reporter import Reporter


@pytest.mark.parametrize("architecture", ["bert", "llama"])
@pytest.mark.parametrize("classes", [1, 5])
def test_a_head_has_the_outputs_of_the_data(architecture: str, classes: int, tmp_path: Path) -> None:
    labels: list[Any] = ["abcde"[at % 5] if classes > 1 else at / 7 for at in range(len(WORDS))]
    data = write_rows(
        tmp_path / "rows.jsonl", [{"text": word, "label": label} for word, label in zip(WORDS, labels, strict=True)]
    )
    model = save_model(tmp_path / "model", chat=False, architecture=architecture)
    values = {"model": str(model), "data": str(data), "method": "full", "where": "head", "heldout": "3"}
    job = prepare(recipe_from({**values, "device": "cpu", "dtype": "float32"}), Reporter())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = predicted(job)
    trained = sum(one.numel() for one in job.model.parameters() if one.requires_grad)
    frozen = sum(one.numel() for one in job.model.parameters() if not one.requires_grad)
    assert found.get("reason") is None
    assert found["predicted"]["adapter"] == 4 * trained
    assert abs(found["predicted"]["weights"] / (4 * frozen) - 1) < 0.05


def test_an_outline_refuses_what_the_model_cannot_do(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", chat=False, architecture="bert")
    with pytest.raises(UserError, match="seq2seq"):
        outline(model, task="seq2seq")


def test_what_an_embedding_leaves_on_disk() -> None:
    assert unread(None, 1536, 30522) == 0.9
    assert unread([], 1536, 30522) == 1.0
    assert unread([0, 1, 2], 1536, 30522) == pytest.approx(1 - 65536 / (1536 * 30522))
    assert unread([42], 1536, 30522) == pytest.approx(1 - 2 * 65536 / (1536 * 30522))  # its row lies over a border
    assert unread(range(30522), 1536, 30522) == 0.0
