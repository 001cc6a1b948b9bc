"""A tiny chat model and rows for it, which most files here train on; a file with others defines its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.conftest import WORDS, save_model, write_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny", chat=True)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = [{"prompt": f"say {one} {two}", "completion": f"{two} {one}"} for one in WORDS[:6] for two in WORDS[6:12]]
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", found)
