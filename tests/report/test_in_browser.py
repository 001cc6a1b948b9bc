"""Reports in headless Chromium: no error on the console, sorting, a phone, darkness, words for every drawing.

Skipped where no Chromium is found. What a page does is asked of it by a script put into a copy of it, whose findings
are read from the page that the browser gives back.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import WORDS, save_model, write_rows

import trimtab as tt
from trimtab.compare.setup import Setup
from trimtab.interop.analysis import analyse
from trimtab.report import analysis, contest
from trimtab.train.rundir import open_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium here")]
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"]
ASK = """
<script>
const found = {errors: window.caught};
const root = document.documentElement, body = getComputedStyle(document.body);
found.wider = root.scrollWidth - root.clientWidth;
found.width = root.clientWidth;
found.colours = [body.backgroundColor, body.color];
found.drawings = [...document.querySelectorAll("figure svg")].map((one) => ({
  role: one.getAttribute("role"), words: one.getAttribute("aria-label") || "",
  width: one.getBoundingClientRect().width, height: one.getBoundingClientRect().height,
}));
found.heads = [...document.querySelectorAll("table.sortable")].map((table) => {
  const value = (cell) => cell.dataset.value ?? cell.textContent;
  const texts = (at) => [...table.tBodies[0].rows].map((row) => value(row.cells[at]));
  return [...table.tHead.rows[0].cells].map((head, at) => {
    const orders = [];
    for (let click = 0; click < 2; click += 1) {
      head.querySelector("button").click();
      orders.push([head.getAttribute("aria-sort"), texts(at)]);
    }
    return {name: head.textContent, orders};
  });
});
const told = document.createElement("pre");
told.id = "told";
told.textContent = JSON.stringify(found);
document.body.append(told);
</script>"""
CATCH = "<script>window.caught = []; addEventListener('error', (event) => window.caught.push(event.message));</script>"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of every kind."""
    folder = tmp_path_factory.mktemp("reports")
    rows = [
        {"text": f"{one} {two}", "label": "short" if len(one) < 5 else "long"} for one in WORDS for two in WORDS[:3]
    ]
    source = save_model(folder / "bert", chat=False, architecture="bert")
    setup = Setup(
        **{"model": str(source), "data": str(write_rows(folder / "rows.jsonl", rows)), "seeds": 2, "steps": 8},
        **{"rates": (1.0,), "refine": (1.0,), "heldout": "18", "dtype": "float32", "batch_size": 4},
        methods=("lora", "ia3", "bitfit"),
    )
    result = tt.compare(setup, folder / "contest")
    run = folder / "contest" / result["runs"]["lora"][0]["directory"]
    model, _ = open_run(run).load()
    learned = analysis.write({"lora": analyse(model)}, folder / "learned.html")
    return {"contest": contest.write(result, folder / "contest"), "analysis": learned}


def seen(page: Path, folder: Path, *flags: str) -> dict[str, Any]:
    """What the page says of itself in the browser."""
    text = page.read_text(encoding="utf-8").replace("<head>", f"<head>{CATCH}", 1)
    copy = folder / page.name
    copy.write_text(text.replace("</body>", f"{ASK}</body>"), encoding="utf-8")
    profile = folder / "profile"
    command = [str(BROWSER), *QUIET, *flags, f"--user-data-dir={profile}", "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    told = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)
    assert told, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(html.unescape(told[1]))
    found["console"] = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return found


def number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text.strip().lower()


@pytest.mark.parametrize("kind", ["contest", "analysis"])
def test_a_report_renders_sorts_and_has_words_for_its_drawings(
    kind: str, pages: dict[str, Path], tmp_path: Path
) -> None:
    found = seen(pages[kind], tmp_path, "--window-size=1200,900")
    assert found["errors"] == []
    assert found["console"] == []
    assert len(found["drawings"]) >= 2
    for drawing in found["drawings"]:
        assert drawing["role"] == "img"
        assert len(drawing["words"]) > 20
        assert min(drawing["width"], drawing["height"]) > 100
    assert found["heads"]
    for head in (one for table in found["heads"] for one in table):
        (up, first), (down, second) = head["orders"]
        assert (up, down) == ("ascending", "descending"), head["name"]
        numbers = [number(one) for one in first if one.strip()]
        if all(isinstance(one, float) for one in numbers):
            assert numbers == sorted(numbers), head["name"]
            assert [number(one) for one in second if one.strip()] == sorted(numbers, reverse=True), head["name"]
    names = [number(one) for one in found["heads"][0][0]["orders"][0][1]]
    assert len(set(names)) > 2
    assert names == sorted(names)


@pytest.mark.parametrize("kind", ["contest", "analysis"])
def test_a_report_fits_a_phone_and_the_dark(kind: str, pages: dict[str, Path], tmp_path: Path) -> None:
    found = seen(pages[kind], tmp_path, "--window-size=390,844")
    assert found["width"] <= 500
    assert found["wider"] <= 0
    dark = seen(pages[kind], tmp_path, "--blink-settings=preferredColorScheme=0")
    light = seen(pages[kind], tmp_path, "--blink-settings=preferredColorScheme=1")
    assert {dark["colours"][0], light["colours"][0]} == {"rgb(22, 24, 27)", "rgb(255, 255, 255)"}
    assert dark["colours"][0] != dark["colours"][1]
