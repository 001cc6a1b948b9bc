"""Ablations: other places at equally many values, other ratios of B's learning rate to A's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import WORDS, save_model, write_rows

import trimtab as tt
from trimtab.catalog import trained_values
from trimtab.compare.ablation import MISS, RATIOS, ablated, ablation, made
from trimtab.compare.setup import Setup, contestant
from trimtab.models.loading import outline


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "bert", chat=False, architecture="bert")


@pytest.fixture(scope="module")
def model(source: Path) -> Any:
    return outline(source)


@pytest.mark.parametrize("text", ["lora:rank=4", "lora:rank=12+where=q", "dora:rank=6+where=q, v", "loha:rank=2"])
def test_every_place_trains_nearly_as_many_values(text: str, model: Any) -> None:
    known = contestant(text).recipe
    wanted, _ = trained_values(model, made(known), known.get("where"))
    found = ablation("places", text, model)
    assert len(found) == len(set(found)) >= 2
    for one in found:
        recipe = contestant(one).recipe
        count, _ = trained_values(model, made(recipe), recipe["where"])
        assert abs(count - wanted) <= MISS * wanted
        for other in (int(recipe["rank"]) - 1, int(recipe["rank"]) + 1):  # no other rank is nearer
            if other:
                away, _ = trained_values(model, made({**recipe, "rank": other}), recipe["where"])
                assert abs(count - wanted) <= abs(away - wanted)


def test_settings_other_than_rank_and_place_stay(model: Any) -> None:
    assert all("alpha=3" in one for one in ablation("places", "lora:rank=4+alpha=3", model))


def test_ratios_are_those_of_lora_plus(model: Any) -> None:
    found = ablated("ratios", ("lora", "lora:rank=4"), model)
    assert len(found) == 2 * len(RATIOS)
    assert contestant(found[-1]).recipe["optimizer_ratio"] == str(RATIOS[-1])


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("places", "ia3", "no rank"),
        ("ratios", "ia3", "no factors A and B"),
        ("ratios", "lora:optimizer=lion", "has an optimizer"),
    ],
)
def test_what_cannot_be_ablated_is_refused(kind: str, text: str, said: str, model: Any) -> None:
    with pytest.raises(tt.UserError, match=said):
        ablation(kind, text, model)


@pytest.mark.slow
def test_a_contest_of_ratios_trains_b_faster(source: Path, tmp_path: Path) -> None:
    rows = [
        {"text": f"{one} {two}", "label": "short" if len(one) < 5 else "long"} for one in WORDS for two in WORDS[:3]
    ]
    setup = Setup(
        **{"model": str(source), "data": str(write_rows(tmp_path / "rows.jsonl", rows)), "seeds": 1, "steps": 8},
        **{"rates": (1.0,), "refine": (1.0,), "heldout": "18", "dtype": "float32", "references": ()},
        methods=tuple(ablation("ratios", "lora:rank=2", outline(source))[::5]),
    )
    result = tt.compare(setup, tmp_path / "contest")
    assert not result["skipped"]
    one, many = (result["runs"][name][0] for name in setup.methods)
    assert many["rate"] == one["rate"] / 2  # that of A; B learns at 32 times it
    assert one["judge"]["loss"] != many["judge"]["loss"]
