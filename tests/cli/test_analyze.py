"""`trimtab analyze`: runs side by side, the page, and what has no weights to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def test_the_command_tells_two_runs_and_refuses(trimtab: Any, runs: dict[str, Path], tmp_path: Path) -> None:
    told = trimtab("analyze", runs["chat"], runs["chat"] / "adapter", "--out", tmp_path / "page.html")
    assert told.code == 0, told.err
    assert "effective rank" in told.out
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 2
    assert not any(word in page for word in ('src="http', 'href="http', "@import", "url(http"))
    document = trimtab("analyze", runs["chat"], "--json").document
    assert document["runs"][0]["changes"][0]["rank"] >= 1
    prefix = trimtab("analyze", runs["plain"])
    assert prefix.code == 2
    assert "PrefixTuning has no change of weights" in prefix.err
    missing = trimtab("analyze", tmp_path / "nothing")
    assert missing.code == 2
    assert "not a directory" in missing.err
