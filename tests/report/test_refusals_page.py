"""The page of refusals is that of the tables in the code."""

from __future__ import annotations

from pathlib import Path

from trimtab.models.coded.gguf_blocks import BLOCKS
from trimtab.models.coded.packed import INSTEAD
from trimtab.report.refusals import page, write
from trimtab.train.updates import REFUSALS

PAGE = Path(__file__).parents[2] / "docs" / "refusals.md"


def test_the_committed_page_is_current() -> None:
    rewrite = "python -c 'from trimtab.report.refusals import write; write(\"docs/refusals.md\")'"
    assert PAGE.read_text(encoding="utf-8") == page(), f"rewrite it: {rewrite}"


def test_every_refusal_is_on_it_with_its_reason_and_fix(tmp_path: Path) -> None:
    text = write(tmp_path / "new" / "refusals.md").read_text(encoding="utf-8")
    for one in REFUSALS:
        assert f"| {one.one} | {one.other} | {one.reason} | {one.fix} |" in text
    assert all(f"| {name} |" in text for name in (*INSTEAD, *BLOCKS, "Q8_0"))
