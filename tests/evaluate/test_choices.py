"""Multiple choice: the shared beginning changes no number, and every way to name the right choice is understood."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.conftest import WORDS, save_model

from trimtab.core.errors import UserError
from trimtab.evaluate.choices import Choice, Question, accuracies, question, questions, score
from trimtab.models.loading import load


@pytest.mark.parametrize("chat", [True, False])
def test_shared_and_plain_agree(tmp_path: Path, chat: bool) -> None:
    loaded = load(save_model(tmp_path / "tiny", chat=chat), dtype="float32", device="cpu")
    asked = [
        Question(f"say {one}", (WORDS[0], f"{WORDS[1]} {WORDS[2]} {WORDS[3]}", one, f"{WORDS[1]} {WORDS[4]}"), 2)
        for one in WORDS[5:11]
    ]
    shared, plain = (score(loaded.model, loaded.tokenizer, asked, shared=way) for way in (True, False))
    for one, other in zip(shared, plain, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-4)
        assert len(set(one.scores)) == 4
        assert one.tokens == other.tokens


def test_the_norms() -> None:
    one = Choice(scores=(-2.0, -3.0, -9.0), tokens=(1, 2, 9), bytes=(2, 2, 3), answer=1)
    assert [one.taken(norm) for norm in ("sum", "token", "byte")] == [0, 2, 0]
    assert accuracies([one]) == {"accuracy_sum": 0, "accuracy_token": 0, "accuracy_byte": 0}


@pytest.mark.parametrize(
    ("row", "choices", "answer"),
    [
        ({"question": "q", "choices": ["a", "b"], "answer": 1}, ("a", "b"), 1),
        ({"prompt": "q", "choices": "a | b | c", "answer": "C"}, ("a", "b", "c"), 2),
        ({"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answer": "y"}, ("x", "y"), 1),
        (
            {
                "instruction": "Which?\n\nAnswer1: an axe Answer2: a bow\n\nAnswer format: answer1/answer2",
                "answer": "answer2",
            },
            ("an axe", "a bow"),
            1,
        ),
        ({"instruction": "Is it?\n\nAnswer format: true/false", "answer": "false"}, ("true", "false"), 1),
    ],
)
def test_rows(row: dict[str, object], choices: tuple[str, ...], answer: int) -> None:
    found = question(row)
    assert (found.choices, found.answer) == (choices, answer)


def test_what_is_wrong_with_rows_is_said() -> None:
    with pytest.raises(UserError, match=r"row 1: the answer '7' is none of 2 choices; row 2: fewer than two choices"):
        questions([{"question": "q", "choices": ["a", "b"], "answer": 7}, {"question": "q", "answer": 0}])
