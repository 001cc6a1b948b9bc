"""The pages in a real browser: silent, alone, sortable, readable on a phone and in the dark, and said in words."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.report import browser as browsers
from tests.report.made_up import pages as made

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browsers.found() is None, reason="no Chromium here (TRIMTAB_BROWSER names one)"),
]
KINDS = ("contest", "classes", "ablation", "ratios", "analysis", "scaling")
CONTRAST = """
(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map((one) => one / 255)
    .map((one) => one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4)
    .reduce((sum, one, at) => sum + one * [0.2126, 0.7152, 0.0722][at], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const found = rgb(getComputedStyle(node).backgroundColor);
      if (found[3] === 255) return found;
    }
    return [255, 255, 255, 255];
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((one) => one.nodeType === 3 && one.textContent.trim());
    if (!own || ["SCRIPT", "STYLE"].includes(node.tagName) || !node.getClientRects().length) continue;
    const style = getComputedStyle(node);
    const [a, b] = [light(rgb(node.namespaceURI.endsWith("svg") ? style.fill : style.color)), light(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push(`${node.tagName} ${node.textContent.trim().slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return found;
})()
"""
SORTED = """
(() => [...document.querySelectorAll("table.sortable")].flatMap((table, number) =>
  [...table.tHead.rows[0].cells].map((head, at) => {
    const cells = () => [...table.tBodies[0].rows].map((row) => row.cells[at])
      .map((cell) => "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent.trim());
    head.querySelector("button").click();
    const up = cells(), first = head.getAttribute("aria-sort");
    head.querySelector("button").click();
    return { number, head: head.textContent, up, first, down: cells(), second: head.getAttribute("aria-sort"),
             marked: table.querySelectorAll("[aria-sort]").length };
  })))()
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return made(tmp_path_factory.mktemp("pages"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browsers.Browser]:
    opened = browsers.Browser(browsers.found() or "", tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_silent_and_asks_for_nothing(kind: str, browser: Any, pages: dict[str, Path]) -> None:
    browser.open(pages[kind])
    assert browser.run("document.readyState") == "complete"
    assert browser.run("document.querySelectorAll('h1').length") == 1
    assert browser.complaints == []
    assert browser.requested == []
    ids = browser.run("[...document.querySelectorAll('[id]')].map((one) => one.id)")
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_every_column_sorts_both_ways(kind: str, browser: Any, pages: dict[str, Path]) -> None:
    browser.open(pages[kind])
    found = browser.run(SORTED)
    assert found
    for one in found:
        assert (one["first"], one["second"], one["marked"]) == ("ascending", "descending", 1), one["head"]
        for cells, falling in ((one["up"], False), (one["down"], True)):
            known = [cell for cell in cells if cell != ""]
            assert cells[: len(known)] == known, f"{one['head']}: empty cells stand last"
            if all(isinstance(cell, int | float) for cell in known):
                assert known == sorted(known, reverse=falling), one["head"]
            else:
                pairs = browser.run(f"{list(map(str, known))!r}.map((one) => one.toLowerCase())")
                ordered = browser.run(f"{pairs!r}.sort((a, b) => {'-' if falling else ''}a.localeCompare(b))")
                assert pairs == ordered, one["head"]
    assert browser.complaints == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_fits_a_phone_and_reads_in_the_dark(kind: str, browser: Any, pages: dict[str, Path]) -> None:
    for width, dark in itertools.product((320, 390, 1200), (False, True)):
        browser.open(pages[kind], width=width, dark=dark)
        wide = browser.run("document.documentElement.scrollWidth")
        assert wide <= width, f"{width} wide: {wide}"
        drawn = browser.run(
            "[...document.querySelectorAll('figure svg')].map((one) => one.getBoundingClientRect().width)"
        )
        assert all(0 < one <= width for one in drawn)
        if width != 320:
            assert browser.run(CONTRAST) == [], "dark" if dark else "light"
        paper = browser.run("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, paper[4:-1].split(","))) < 200) == dark
        assert browser.complaints == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_figure_is_said_in_words_and_keys_reach_everything(
    kind: str, browser: Any, pages: dict[str, Path]
) -> None:
    browser.open(pages[kind])
    figures = browser.run(
        "[...document.querySelectorAll('figure')].map((one) => [one.querySelector('svg')?.getAttribute('role'), "
        "one.querySelector('svg')?.getAttribute('aria-label'), one.querySelector('figcaption')?.textContent])"
    )
    assert figures
    for role, label, caption in figures:
        assert role == "img"
        assert label
        assert len(label) > 20
        assert caption == label
    loose = "document.querySelectorAll('img:not([alt]), svg:not([role])').length"
    assert browser.run(loose) == 0
    scopes = browser.run("[...document.querySelectorAll('th')].map((one) => one.scope)")
    assert set(scopes) == {"col", "row"}
    unreached = "[...document.querySelectorAll('thead button, .wide')].filter((one) => one.tabIndex < 0).length"
    assert browser.run(unreached) == 0
    assert browser.run("document.documentElement.lang") == "en"


def test_a_page_prints(browser: Any, pages: dict[str, Path]) -> None:
    browser.open(pages["contest"], dark=True, media="print")
    assert base64.b64decode(browser.call("Page.printToPDF")["data"])[:5] == b"%PDF-"
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_what_is_looked_for_would_be_found(browser: Any, tmp_path: Path) -> None:
    """The checks themselves, on a page with every fault."""
    page = tmp_path / "faults.html"
    page.write_text(
        "<!doctype html><body><p style='color:#999'>pale</p><div style='width:2000px'>wide</div>"
        "<script>console.error('loud'); missing()</script><img src='nowhere.png'></body>"
    )
    browser.open(page, width=390)
    assert len(browser.complaints) >= 2
    assert browser.requested
    assert browser.run("document.documentElement.scrollWidth") > 390
    assert [one for one in browser.run(CONTRAST) if "pale" in one]
