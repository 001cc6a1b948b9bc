"""Several data sets as one: what an epoch has of each, and what a list of them may not say."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from trimtab.core.errors import UserError
from trimtab.data.batches import batches
from trimtab.data.encoded import Encoded, EncodedSet, Report
from trimtab.data.mixture import Mixed, apportioned, gather, joined, row_name, rows_per_epoch

REPORT = Report(**(dict.fromkeys(Report.__dataclass_fields__, 1) | {"max_length": 9, "notes": (), "template": "plain"}))  # type: ignore[arg-type]


def mixture(folder: Path, text: str, sizes: dict[str, int]) -> Path:
    for name, size in sizes.items():
        lines = [f'{{"prompt": "{name} {at}", "completion": "answer"}}' for at in range(size)]
        (folder / name).write_text("\n".join(lines))
    path = folder / "mix.yaml"
    path.write_text(text)
    return path


def mixed(path: Path) -> Mixed:
    """The rows of a mixture as sequences of one token."""
    sources = gather(path)
    sets = [
        EncodedSet(tuple(Encoded([0], [True], row=row.row) for row in one.rows), REPORT, None) for one in sources.parts
    ]
    found = joined(sets, sources, None)
    assert isinstance(found, Mixed)
    return found


def test_without_weights_every_row_comes_once(tmp_path: Path) -> None:
    found = mixed(mixture(tmp_path, "- a.jsonl\n- b.jsonl\n", {"a.jsonl": 5, "b.jsonl": 12}))
    assert found.amounts == (5, 12)
    for epoch in range(3):
        assert sorted(found.drawn(0, epoch)) == list(range(17))


def test_weights_are_shares_of_an_epoch(tmp_path: Path) -> None:
    text = "- path: a.jsonl\n  weight: 3\n- path: b.jsonl\n  weight: 1\n"
    found = mixed(mixture(tmp_path, text, {"a.jsonl": 5, "b.jsonl": 15}))
    assert found.amounts == (15, 5)
    assert rows_per_epoch(found) == 20
    for epoch in range(4):
        counts = Counter(index < 5 for index in found.drawn(0, epoch))
        assert counts == {True: 15, False: 5}


@pytest.mark.parametrize(("temperature", "amounts"), [(1, (2, 18)), (2, (5, 15)), (1e9, (10, 10))])
def test_a_temperature_flattens_sizes(tmp_path: Path, temperature: float, amounts: tuple[int, int]) -> None:
    text = f"temperature: {temperature}\nsources: [a.jsonl, b.jsonl]\n"
    assert mixed(mixture(tmp_path, text, {"a.jsonl": 2, "b.jsonl": 18})).amounts == amounts


def test_passes_go_on_from_epoch_to_epoch(tmp_path: Path) -> None:
    text = "- path: a.jsonl\n  weight: 1\n- path: b.jsonl\n  weight: 4\n"
    found = mixed(mixture(tmp_path, text, {"a.jsonl": 10, "b.jsonl": 5}))
    assert found.amounts == (3, 12)
    of_a = [index for epoch in range(10) for index in found.drawn(7, epoch) if index < 10]
    of_b = [index for epoch in range(10) for index in found.drawn(7, epoch) if index >= 10]
    for at in range(0, 30, 10):
        assert sorted(of_a[at : at + 10]) == list(range(10))
    for at in range(0, 120, 5):
        assert sorted(of_b[at : at + 5]) == list(range(10, 15))
    assert of_a[:10] != of_a[10:20]


def test_batches_depend_on_seed_and_epoch_alone(tmp_path: Path) -> None:
    text = "- path: a.jsonl\n  weight: 1\n- path: b.jsonl\n  weight: 1\n"
    found = mixed(mixture(tmp_path, text, {"a.jsonl": 7, "b.jsonl": 9}))
    made = batches(found, 4, 3, 1)
    assert made == batches(found, 4, 3, 1)
    assert made != batches(found, 4, 4, 1)
    assert made != batches(found, 4, 3, 2)
    assert Counter(index < 7 for batch in made for index in batch) == {True: 8, False: 8}
    assert [index for batch in batches(found, 4, 0, 0, shuffle=False) for index in batch] == list(range(16))


def test_a_row_says_whose_it_is(tmp_path: Path) -> None:
    found = mixed(mixture(tmp_path, "- a.jsonl\n- b.jsonl\n", {"a.jsonl": 2, "b.jsonl": 3}))
    assert [row_name(found, index) for index in range(5)] == [
        "1 of a.jsonl",
        "2 of a.jsonl",
        "1 of b.jsonl",
        "2 of b.jsonl",
        "3 of b.jsonl",
    ]
    assert len(found.part(1)) == 3
    assert row_name(found.part(1), 0) == "1"


def test_one_source_is_no_mixture(tmp_path: Path) -> None:
    sources = gather(mixture(tmp_path, "- a.jsonl\n", {"a.jsonl": 2}))
    one = EncodedSet((Encoded([0], [True]),), REPORT, None)
    assert joined([one], sources, None) is one


def test_apportioned_rounds_the_largest_remainders_up() -> None:
    assert apportioned(10, [1, 1, 1]) == [4, 3, 3]
    assert apportioned(7, [0.2, 0.5, 0.3]) == [1, 4, 2]
    assert apportioned(0, [2, 1]) == [0, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no sources are listed"),
        ("sources: []", "no sources are listed"),
        ("- weight: 2", "source 1 has no path"),
        ("- path: a.jsonl\n  wieght: 2", "nobody reads 'wieght' of source 1 \\(nearest: weight\\)"),
        ("sauces: [a.jsonl]", "nobody reads 'sauces' \\(nearest: sources\\)"),
        ("- path: a.jsonl\n  weight: 0\n", "the weight of source 1 is 0"),
        ("- path: a.jsonl\n  weight: .inf\n", "the weight of source 1 is inf"),
        ("- path: a.jsonl\n  weight: 1\n- b.jsonl", "1 of 2 sources have a weight"),
        ("temperature: 2\nsources:\n- path: a.jsonl\n  weight: 1\n", "say the same thing twice"),
        ("temperature: -2\nsources: [a.jsonl]", "temperature is -2"),
        ("- a.jsonl\n- a.jsonl", "a.jsonl is listed twice"),
        ("- other.yaml", "source 1 is a mixture itself"),
        ("- path: a.jsonl\n  columns: [prompt]", "the columns of source 1"),
        ("- {", "not valid YAML"),
        ("- nowhere.jsonl", "no such file"),
    ],
)
def test_what_a_list_may_not_say(tmp_path: Path, text: str, message: str) -> None:
    path = mixture(tmp_path, text, {"a.jsonl": 2, "b.jsonl": 2})
    with pytest.raises(UserError, match=message):
        gather(path)


def test_columns_are_those_of_each_source(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("mr,ref\nx,y\n")
    path = mixture(tmp_path, "- path: a.csv\n  columns: {prompt: mr, completion: ref}\n- b.jsonl\n", {"b.jsonl": 1})
    assert [one.form.name for one in gather(path).parts] == ["prompt-completion", "prompt-completion"]
    with pytest.raises(UserError, match=r"columns: .* is a mixture"):
        gather(path, {"prompt": "mr"})


def test_a_weight_that_leaves_a_source_without_a_row_is_refused(tmp_path: Path) -> None:
    text = "- path: a.jsonl\n  weight: 1\n- path: b.jsonl\n  weight: 100\n"
    with pytest.raises(UserError, match=r"a\.jsonl has not one row in an epoch of 4"):
        mixed(mixture(tmp_path, text, {"a.jsonl": 2, "b.jsonl": 2}))
