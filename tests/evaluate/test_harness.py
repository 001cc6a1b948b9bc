"""The LM evaluation harness over a model of ours: the numbers of the plain way, and those of its own model class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.evaluate.tiny_generators import byte_tokenizer, decoder

import trimtab as tt
from trimtab.core.errors import UserError
from trimtab.evaluate.generate import generate
from trimtab.evaluate.harness import Continued, continued, log_likelihoods

PAIRS = [("the cat ", "sat"), ("", "on the mat"), ("a long way to the sea", " and back"), ("x", "y"), ("so ", "it is")]
TASKS = {
    "choice": """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "whole": """
task: whole
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "written": """
task: written
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{wanted}}"
generation_kwargs: {until: ["\\n", "q"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


def model() -> Any:
    made = tt.attach(decoder("llama"), tt.LoRA(rank=2), "q, v")
    torch.manual_seed(3)
    for parameter in made.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return made


def plainly(model: Any, row: Continued) -> tuple[float, bool]:
    with torch.no_grad():
        logs = model(torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
    at = range(row.start, len(row.ids))
    likeliest = all(int(logs[place - 1].argmax()) == row.ids[place] for place in at)
    return float(sum(logs[place - 1, row.ids[place]] for place in at)), likeliest


def test_log_likelihoods_are_the_plain_ones_in_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.evaluate.harness.CHUNK", 3)
    words, made = byte_tokenizer(), model()
    rows = [continued(words, *pair, 40) for pair in PAIRS]
    best = generate(made, words, [rows[0].ids], 3)[0]
    rows.append(continued(words, "the cat sat", best, 40))
    expected = [plainly(made, row) for row in rows]
    for size in (1, 4):
        found = log_likelihoods(made, rows, batch_size=size)
        assert [one for one, _ in found] == pytest.approx([one for one, _ in expected], abs=1e-4)
        assert [one for _, one in found] == [one for _, one in expected]


def test_white_space_at_the_border_belongs_to_the_continuation_and_long_contexts_are_cut() -> None:
    words = byte_tokenizer()
    row = continued(words, "ab ", "cd", 40)
    assert (len(row.ids), row.start) == (5, 2)
    assert continued(words, "", "cd", 40).ids[0] == words.eos_token_id
    cut = continued(words, "abcdefgh", "ij", 3)
    assert (words.decode(cut.ids), cut.start) == ("ghij", 2)


def test_answers_end_before_the_first_stop() -> None:
    words, made = byte_tokenizer(), model()
    ids = [words("the cat")["input_ids"], words("a long way")["input_ids"]]
    whole = generate(made, words, ids, 12)
    stop = whole[0][4:6]
    cut = generate(made, words, ids, 12, until=[stop])
    assert cut == [text[: text.index(stop)] if stop in text else text for text in whole]
    assert cut[0] != whole[0]


def written_tasks(folder: Path) -> Path:
    rows = [
        {
            "question": one,
            "choices": [two, "zz", "no"],
            "answer": at % 3,
            "text": f"{one}{two} and more " * 2 * at,
            "wanted": two,
        }
        for at, (one, two) in enumerate(PAIRS)
        if one
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.replace("ROWS", str(folder / "rows.json")))
    return folder


@pytest.mark.slow
def test_the_harness_says_of_ours_what_it_says_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from trimtab.evaluate.harness import harness, measures

    folder, words, made = written_tasks(tmp_path), byte_tokenizer(), model()
    ours = harness(made, words, list(TASKS), folder=folder, batch_size=3)
    peer = HFLM(pretrained=made, tokenizer=words, batch_size=2, max_length=64)
    manager = TaskManager(include_path=str(folder))
    told = lm_eval.simple_evaluate(model=peer, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
    theirs = {name: measures(values) for name, values in told["results"].items()}
    assert set(ours) == set(TASKS)
    for name, values in theirs.items():
        assert ours[name] == pytest.approx(values, rel=1e-4), name
    with pytest.raises(UserError, match="no task choise"):
        harness(made, words, ["choise"], folder=folder)


def test_without_the_package_the_fix_is_named() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        from trimtab.evaluate.harness import harness

        with pytest.raises(UserError) as told:
            harness(model(), byte_tokenizer(), ["x"])
        assert "trimtab[harness]" in str(told.value)
    else:
        pytest.skip("lm-eval is here")
