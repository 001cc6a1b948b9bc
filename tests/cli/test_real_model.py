"""The quickstart on the real starter model, with fewer rows than it has for people."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from trimtab.models.starters import RECORD, home

NAME = "smollm2-135m-instruct"


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("TRIMTAB_REAL"), reason="minutes of training: TRIMTAB_REAL=1 asks for it")
@pytest.mark.skipif(not (home() / "models" / NAME / RECORD).is_file(), reason=f"`trimtab models {NAME} --fetch` first")
def test_quickstart_teaches_the_starter_to_write_records(
    trimtab: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.cli import quickstart

    monkeypatch.setattr(quickstart, "RECIPE", {**quickstart.RECIPE, "limit": 64})
    real = quickstart.answered
    monkeypatch.setattr(quickstart, "answered", lambda model, words, prompts: real(model, words, prompts[:12]) * 5)
    done = trimtab("quickstart", "--json")
    assert done.code == 0, done.err
    found = done.document
    assert found["after"]["loss"] < 0.5 * found["before"]["loss"]
    assert found["scores"]["before"]["exact"] == 0
    assert found["scores"]["after"]["valid"] > 0.5
    answer = trimtab("chat", found["directory"], "--prompt", found["examples"][0]["prompt"], "--json").document[
        "answer"
    ]
    assert answer == found["examples"][0]["after"]
