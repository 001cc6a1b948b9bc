"""A contest on tiny models: fair, resumable, its report readable, its words those of its figures."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import WORDS, save_model, write_rows

import trimtab as tt
from trimtab.compare.contest import Watcher, edges, opened
from trimtab.compare.runs import RESULTS, Hall, Journal
from trimtab.compare.setup import Setup, contestant, cost, entries_of, naive_cost
from trimtab.evaluate.reference import BUILT_IN, reference_text
from trimtab.report.contest import write
from trimtab.train.rundir import open_run

pytestmark = pytest.mark.slow
VOID = {"meta", "link", "br", "path", "use", "rect", "circle"}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("contest")
    rows = [
        {"text": f"{one} {two}", "label": "short" if len(one) < 5 else "long"} for one in WORDS for two in WORDS[:4]
    ]
    model = save_model(folder / "bert", chat=False, architecture="bert")
    data = write_rows(folder / "rows.jsonl", rows)
    return Setup(
        **{"model": str(model), "data": str(data), "methods": ("lora", "ia3"), "seeds": 2, "steps": 8},
        **{"rates": (0.5, 2.0), "refine": (1.0, 2.0), "heldout": "18", "dtype": "float32", "batch_size": 4},
        references=("untuned", "head only"),
    )


@pytest.fixture(scope="module")
def held(labelled: Setup, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("held") / "contest"
    return tt.compare(labelled, folder), folder


def runs_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / RESULTS).read_text().splitlines()]


def test_every_method_gets_the_same(held: tuple[dict[str, Any], Path]) -> None:
    result, folder = held
    for name in ("lora", "ia3", "head only"):
        runs = [run for run in runs_of(folder) if run["name"] == name]
        assert [run["steps"] for run in runs] == [8] * 5  # two rates, two refined, one more seed
        assert sorted({run["seed"] for run in runs}) == [0, 1]
        kept = result["runs"][name]
        assert len(kept) == 2
        assert len({run["rate"] for run in kept}) == 1
        second = [run for run in runs if run["final"] and run["seed"] == 0]
        assert kept[0]["choose"] == min(run["choose"] for run in second)
    assert {row["name"] for row in result["table"]} == {"untuned", "head only", "lora", "ia3"}
    assert result["rows"]["choose"] + result["rows"]["judge"] == 18


def test_the_files_of_the_chosen_runs_are_there_and_no_others(held: tuple[dict[str, Any], Path]) -> None:
    result, folder = held
    wanted = {run["directory"] for runs in result["runs"].values() for run in runs if "directory" in run}
    assert {f"runs/{one.name}" for one in (folder / "runs").iterdir()} == wanted
    run = open_run(folder / result["runs"]["lora"][0]["directory"])
    assert run.recipe.learning_rate == result["runs"]["lora"][0]["rate"]
    model, _ = run.load()
    assert model is not None
    assert not list(folder.glob(".trial-*"))


def test_the_verdict_follows_from_the_rows(held: tuple[dict[str, Any], Path]) -> None:
    result, _ = held
    verdict = result["verdict"]
    best = max((row for row in result["table"] if row["kind"] == "method"), key=lambda row: row["accuracy"])
    by_name = {row["name"]: row for row in result["table"]}
    assert by_name[verdict["leader"]]["accuracy"] == best["accuracy"]
    assert verdict["recommended"] in verdict["tied"]
    for name, one in verdict["differences"].items():
        assert one["mean"] == pytest.approx(by_name[verdict["leader"]]["accuracy"] - by_name[name]["accuracy"])
        assert one["tie"] == (one["low"] <= 0 <= one["high"])
        assert one["level"] == pytest.approx(1 - 0.05 / 3)


def test_a_second_call_repeats_nothing_and_may_add_a_method(
    labelled: Setup, held: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    result, folder = held
    ran: list[str] = []
    run = Hall._run
    monkeypatch.setattr(Hall, "_run", lambda self, entry, *rest: ran.append(entry.name) or run(self, entry, *rest))
    again = tt.compare(labelled, folder)
    assert ran == []
    assert again["table"] == result["table"]
    tt.compare(replace(labelled, methods=("lora", "ia3", "bitfit")), folder)
    assert set(ran) == {"bitfit"}


def test_a_contest_killed_halfway_goes_on(labelled: Setup, held: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    class Killer(Watcher):
        left = 6

        def ran(self, *unused: Any) -> None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    folder = tmp_path / "contest"
    with pytest.raises(KeyboardInterrupt):
        tt.compare(labelled, folder, Killer())
    before = runs_of(folder)
    with open(folder / RESULTS, "a") as out:
        out.write('{"key": "half a li')  # a kill in the middle of a line
    result = tt.compare(labelled, folder)
    whole = Journal(folder / RESULTS).known
    assert all(whole[run["key"]] == run for run in before)
    for row, wanted in zip(result["table"], held[0]["table"], strict=True):
        assert (row["name"], row["losses"]) == (wanted["name"], wanted["losses"])


def test_another_contest_is_not_mixed_in(labelled: Setup, held: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    with pytest.raises(tt.UserError, match="holds another contest: batch_size"):
        opened(replace(labelled, batch_size=2), held[1])
    (tmp_path / "file").write_text("mine")
    with pytest.raises(tt.UserError, match="is not empty"):
        opened(labelled, tmp_path)


class Reader(HTMLParser):
    """Checks that tags close in order, and keeps texts, links and cells."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.heads: list[str] = []
        self.images: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        found = dict(attrs)
        self.links += [str(found[key]) for key in ("src", "href") if found.get(key) and tag != "use"]
        if tag == "svg":
            self.images.append(found)
        if tag == "th":
            self.heads.append(str(found.get("scope")))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def test_the_report_is_one_sound_file(held: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    result = json.loads(json.dumps(held[0]))
    result["setup"]["data"] = "rows<script>alert(1)</script>.jsonl"
    page = write(result, tmp_path).read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert [link for link in reader.links if not link.startswith(("data:", "#"))] == []
    assert "<script>alert" not in page
    assert set(reader.heads) == {"col", "row"}
    assert len(reader.images) >= 4
    assert all(image["role"] == "img" and image["aria-label"] for image in reader.images)
    assert result["verdict"]["recommended"] in page
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    for name in ("seconds", "peak", "saved", "curves", "differences"):
        assert (tmp_path / "plots" / f"{name}.svg").stat().st_size > 1000
        assert (tmp_path / "plots" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_a_chat_contest_has_references_samples_and_forgetting(tmp_path: Path) -> None:
    rows = [{"prompt": f"say {one} {two}", "completion": f"{two} {one}"} for one in WORDS[:8] for two in WORDS[6:12]]
    (tmp_path / "text.txt").write_text(" ".join(WORDS))
    setup = Setup(
        **{"model": str(save_model(tmp_path / "tiny", chat=True)), "methods": ("lora:rank=2+where=q",), "steps": 8},
        **{"data": str(write_rows(tmp_path / "rows.jsonl", rows)), "seeds": 2, "rates": (1.0,), "refine": (1.0,)},
        **{"heldout": "12", "dtype": "float32", "reference_text": str(tmp_path / "text.txt")},
    )
    result = tt.compare(setup, tmp_path / "contest")
    by_name = {row["name"]: row for row in result["table"]}
    assert set(by_name) == {"untuned", "few-shot", "full", "lora:rank=2+where=q"}
    assert by_name["untuned"]["seeds"] == 1
    before, after = by_name["untuned"]["reference_loss"], by_name["full"]["reference_loss"]
    assert by_name["full"]["forgetting"] == after - before != 0
    assert "forgetting" not in by_name["few-shot"]
    assert by_name["full"]["predicted_bytes"] > by_name["full"]["saved_bytes"]
    assert any(one.startswith("On text of another kind") for one in result["verdict"]["sentences"])
    assert by_name["lora:rank=2+where=q"]["trainable"] == 2 * 2 * (32 + 32)
    assert len(result["runs"]["untuned"][0]["samples"]) == 3
    assert result["cost"]["steps"] == 2 * 2 * 8
    assert "Answers" in write(result, tmp_path / "contest").read_text(encoding="utf-8")


def test_names_settings_and_costs() -> None:
    assert contestant("prefix").recipe["method"] == "prefix_tuning"
    assert contestant("LoRA:rank=16").recipe == {"method": "lora", "rank": "16"}
    assert contestant("full").recipe == {"method": "full", "where": "all"}
    assert contestant("loftq").recipe["quantize"] == "nf4"
    assert [dict(one) for one in contestant("lora", search=True).alternatives] == [{"rank": 4}, {"rank": 32}]
    for text, said in (("lorra", "lorra"), ("lora:rnk=3", "no setting of lora"), ("nf4", "is not a method")):
        with pytest.raises(tt.UserError, match=said):
            contestant(text)
    setup = Setup(model="m", data="d", methods=("lora", "untuned"))
    with pytest.raises(tt.UserError, match="no method"):
        entries_of(setup, "causal", True)
    setup = Setup(model="m", data="d", methods=("lora",))
    lora = contestant("lora")
    assert cost(setup, lora) == 3 * 0.25 + 3 + 2
    assert naive_cost(setup, lora) == 7 * 3  # 0.125, 0.25, ... 8
    assert edges(setup) == (0.125, 8)
    for wrong in ({"seeds": 0}, {"methods": ()}, {"rates": (0.0,)}, {"references": ("best",)}):
        with pytest.raises(tt.UserError, match="compare"):
            replace(setup, **wrong)


def test_forgetting_is_measured_by_default_where_a_model_writes() -> None:
    assert Setup(model="m", data="d", methods=("lora",)).reference_text == BUILT_IN
    assert len(reference_text(BUILT_IN).split()) > 800
    with pytest.raises(tt.UserError, match="cannot be read"):
        reference_text("nowhere.txt")
