"""Forms are told from columns; rows that do not fit, and files that could be read two ways, are errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.errors import UserError
from trimtab.data.examples import Conversation, Labelled, Message, PromptCompletion, Text
from trimtab.data.forms import detect, examples
from trimtab.data.reading import Table
from trimtab.data.splitting import split, take


def table(*rows, kind="jsonl"):
    columns = tuple(dict.fromkeys(key for row in rows for key in row))
    return Table(list(rows), Path(f"data.{kind}"), kind, "", columns, tuple(range(1, len(rows) + 1)))


def made(*rows, columns=None, kind="jsonl"):
    given = table(*rows, kind=kind)
    form = detect(given, columns)
    return form, examples(given, form)


def user(text):
    return Message("user", text)


def answer(text):
    return Message("assistant", text)


@pytest.mark.parametrize(
    "prompt,completion",
    [("prompt", "completion"), ("question", "answer"), ("Input", "OUTPUT"), ("context", "continuation")],
)
def test_prompt_and_completion_by_any_of_their_names(prompt, completion):
    form, found = made({prompt: "a", completion: "b"})
    assert form.name == "prompt-completion"
    assert dict(form.columns) == {"prompt": prompt, "completion": completion}
    assert found == [PromptCompletion("a", "b")]
    assert found[0].row == 1


def test_named_columns_say_everything():
    form, found = made({"mr": "a", "ref": "b", "text": "c"}, columns={"prompt": "MR", "completion": "ref"})
    assert found == [PromptCompletion("a", "b")]
    assert form.ignored == ("text",)
    form, found = made({"text": "a", "label": 1}, columns={"text": "text"})
    assert (form.name, found) == ("text", [Text("a")])


def test_alpaca_joins_instruction_and_input():
    form, found = made(
        {"instruction": "Do", "input": "this", "output": "done", "answer": "x"},
        {"instruction": "Do", "input": "", "output": "done"},
        {"instruction": "Do", "output": "done"},
        {"instruction": "", "input": "this", "output": "done"},
    )
    assert (form.name, form.ignored) == ("alpaca", ("answer",))
    asked = [example.messages[0].content for example in found]
    assert asked == ["Do\n\nthis", "Do", "Do", "this"]
    assert found[0] == Conversation((user("Do\n\nthis"), answer("done")))


def test_alpaca_with_a_system_prompt():
    _, found = made({"instruction": "Do", "output": "done", "system": "Be brief."})
    assert found == [Conversation((Message("system", "Be brief."), user("Do"), answer("done")))]


def test_sharegpt_roles_are_mapped():
    turns = [("system", "s"), ("human", "h"), ("gpt", "g"), ("tool", "t"), ("function_call", "f"), ("observation", "o")]
    form, found = made({"conversations": [{"from": who, "value": what} for who, what in turns]})
    assert form.name == "sharegpt"
    assert [m.role for m in found[0].messages] == ["system", "user", "assistant", "tool", "assistant", "tool"]
    assert [m.content for m in found[0].messages] == list("shgtfo")


def test_chat_messages():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]
    form, found = made({"messages": turns, "system": "Be brief."})
    assert form.name == "messages"
    assert found == [Conversation((Message("system", "Be brief."), user("a"), answer("b")))]
    assert made({"conversations": turns})[0].name == "messages"


def test_a_turn_of_weight_nought_is_not_trained():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    _, found = made({"messages": [*turns, {"role": "assistant", "content": "c", "weight": 1}]})
    assert [message.trained for message in found[0].messages] == [True, False, True]


def test_text():
    form, found = made({"text": "a", "id": 3})
    assert (form.name, found, form.ignored) == ("text", [Text("a")], ("id",))


@pytest.mark.parametrize(
    "labels,kind,target,expected",
    [
        (["yes", "no"], "jsonl", "classes", ["yes", "no"]),
        ([0, 1], "jsonl", "classes", [0, 1]),
        ([True, False], "jsonl", "classes", [True, False]),
        ([0.5, 1], "jsonl", "regression", [0.5, 1.0]),
        (["0", "1"], "csv", "classes", ["0", "1"]),
        (["5.000", "3"], "tsv", "regression", [5.0, 3.0]),
        (["5.000", "3"], "jsonl", "classes", ["5.000", "3"]),
        (["a", "3"], "csv", "classes", ["a", "3"]),
        (["1_0", "3.5", "x", "y"], "csv", "classes", ["1_0", "3.5", "x", "y"]),
    ],
)
def test_labels_are_classes_or_numbers(labels, kind, target, expected):
    form, found = made(*({"sentence": "a", "label": label} for label in labels), kind=kind)
    assert (form.name, form.target) == ("labelled", target)
    assert [example.label for example in found] == expected
    assert [type(example.label) for example in found] == [type(label) for label in expected]


@pytest.mark.parametrize("pair", [("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence")])
def test_labelled_pairs(pair):
    _, found = made({pair[0]: "a", pair[1]: "b", "label": "x"})
    assert found == [Labelled("a", "b", "x")]


def test_a_score_labels_a_pair_but_no_text():
    form, _ = made({"sentence1": "a", "sentence2": "b", "score": 0.5})
    assert form.target == "regression"
    assert made({"text": "a", "score": 0.5})[0].name == "text"


@pytest.mark.parametrize("labels", [["a", 1], [True, 1], [0.5, "x"], [1.5, True]])
def test_mixed_labels_are_an_error(labels):
    with pytest.raises(UserError, match="label"):
        made(*({"text": "a", "label": label} for label in labels))


def test_a_csv_of_numbers_with_one_odd_label():
    rows = [{"text": "a", "label": label} for label in ("1.5", "2.5", "n/a")]
    with pytest.raises(UserError, match=r"row 3 \(line 3\): the label 'n/a' is a string, the others are numbers"):
        made(*rows, kind="csv")


def test_no_form_lists_all_and_what_they_miss():
    with pytest.raises(UserError) as caught:
        detect(table({"promt": "a", "ref": "b"}))
    message = str(caught.value)
    assert "no form fits the columns promt, ref" in message
    assert "prompt-completion: misses prompt (a column prompt or" in message
    assert "nearest: promt" in message
    for name in ("alpaca", "chat", "labelled", "text"):
        assert f"{name}: misses" in message
    assert 'columns={"prompt": "promt", "completion": "ref"}' in message
    assert "header=False" not in message


def test_no_form_of_a_table_hints_at_the_header():
    with pytest.raises(UserError, match="header=False"):
        detect(table({"gj04": "a", "Some sentence.": "b"}, kind="tsv"))


def test_preference_data_is_refused():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(UserError, match="wanted and unwanted answers"):
        detect(table({"messages": turns, "label": True}))
    assert detect(table({"messages": turns, "label": True}), {"messages": "messages"}).ignored == ("label",)
    with pytest.raises(UserError, match="preference data has no form here"):
        detect(table({"conversations": turns, "chosen": {}, "rejected": {}}))
    with pytest.raises(UserError, match="preference data has no form here"):
        detect(table({"prompt": "a", "chosen": "b", "rejected": "c"}))


def test_ambiguous_columns_are_an_error():
    with pytest.raises(UserError, match="question and context could each be the prompt"):
        detect(table({"question": "a", "context": "b", "answer": "c"}))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(UserError, match=r"several forms fit the columns: alpaca .* and chat"):
        detect(table({"messages": turns, "instruction": "a", "output": "b"}))


def test_the_plain_names_win_over_their_aliases():
    form, _ = made({"prompt": "a", "completion": "b", "question": "c"})
    assert (form.columns["prompt"], form.ignored) == ("prompt", ("question",))


@pytest.mark.parametrize(
    "columns,message",
    [
        ({"prompt": "mrr", "completion": "ref"}, "no column 'mrr' for prompt; the file has mr, ref; nearest: mr"),
        ({"promt": "mr", "completion": "ref"}, "no role 'promt'; .*nearest: prompt"),
        ({"prompt": "mr"}, "names prompt, which is no form"),
        ({"prompt": "mr", "completion": "mr"}, "'mr' is named for two roles"),
        ({}, "names no role"),
    ],
)
def test_wrong_columns(columns, message):
    with pytest.raises(UserError, match=message):
        detect(table({"mr": "a", "ref": "b"}), columns)


GOOD = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    "odd,message",
    [
        ({"prompt": "a"}, r"row 3 \(line 3\): misses 'completion'; it has prompt"),
        ({"prompt": "a", "completio": "b"}, "it has prompt, completio; nearest: completio"),
        ({"prompt": "a", "completion": None}, "'completion' is null"),
        ({"prompt": "a", "completion": 42}, "'completion' is the int 42, expected text"),
        ({"prompt": ["a"], "completion": "b"}, "'prompt' is a list, expected text"),
        ({"prompt": " \n", "completion": "b"}, "neither prompt nor text: 'prompt' is blank"),
        ({"prompt": "a", "completion": "b\ud83d"}, "half a character"),
        ({"instruction": "a", "output": "b"}, "the row looks like alpaca: one file must have one form"),
        ({"text": "a"}, "the row looks like text"),
        ({"messages": [{"role": "user", "content": "a"}]}, "the row looks like messages"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "the row looks like sharegpt"),
        ({}, "misses 'prompt'; it has nothing"),
    ],
)
def test_an_odd_row_is_named(odd, message):
    with pytest.raises(UserError, match=message):
        detect(table(GOOD, GOOD, odd))


def test_all_odd_rows_are_counted():
    with pytest.raises(UserError, match=r"12 of 25 rows do not fit the form prompt-completion[\s\S]*\(\+2 more\)"):
        detect(table(*[GOOD] * 13, *[{"prompt": "a"}] * 12))


def test_the_form_is_that_of_most_rows():
    with pytest.raises(UserError, match=r"row 1 \(line 1\): misses 'prompt'.*looks like text"):
        detect(table({"text": "a"}, GOOD, GOOD))


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


@pytest.mark.parametrize(
    "messages,message",
    [
        ([], "no turns"),
        ("[]", "is text, expected a list of turns"),
        (["a"], "turn 1 is text, expected an object with role and content"),
        (turns(("user", "a")), "no assistant turn"),
        (turns(("user", "a"), ("asistant", "b")), "unknown role 'asistant'.*nearest: assistant"),
        ([{"role": "user"}], "turn 1 misses 'content'; it has role"),
        ([{"content": "a"}], "turn 1 misses 'role'; it has content"),
        ([{"role": "assistant", "content": None, "tool_calls": [{}]}], "tool_calls"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "not text"),
        ([{"role": "assistant", "content": "a", "weight": 0.5}], "weight 0.5, expected 0 or 1"),
        ([{"role": "user", "content": "a"}, {"from": "gpt", "value": "b"}], "looks like the other chat form"),
    ],
)
def test_odd_messages(messages, message):
    good = {"messages": turns(("user", "a"), ("assistant", "b"))}
    with pytest.raises(UserError, match=f"row 2.*{message}"):
        detect(table(good, {"messages": messages}))


@pytest.mark.parametrize("label,message", [(None, "null"), (" ", "blank"), ([1], "a list"), (float("nan"), "finite")])
def test_odd_labels(label, message):
    with pytest.raises(UserError, match=f"row 2.*{message}"):
        detect(table({"text": "a", "label": "x"}, {"text": "b", "label": label}))


def test_examples_of_another_table_are_checked_too():
    form = detect(table(GOOD))
    with pytest.raises(UserError, match="row 1"):
        examples(table({"prompt": "a"}), form)


def groups(count, size):
    return [PromptCompletion(f"prompt {number}", f"answer {copy}") for number in range(count) for copy in range(size)]


def test_split_keeps_equal_prompts_together():
    given = groups(40, 3)
    train, held = split(given, 0.25, seed=1)
    assert len(train) + len(held) == 120
    assert abs(len(held) - 30) <= 1
    assert not {e.prompt for e in train} & {e.prompt for e in held}
    assert train == [e for e in given if e in train]


def test_split_depends_on_the_seed_alone():
    given = groups(40, 1)
    assert split(given, 10, seed=1) == split(given, 10, seed=1)
    assert split(given, 10, seed=1) != split(given, 10, seed=2)
    shuffled = given[::-1]
    assert set(split(shuffled, 10, seed=1)[1]) == set(split(given, 10, seed=1)[1])


def test_a_new_row_changes_little_of_a_split():
    given = groups(100, 1)
    before = set(split(given, 0.2)[1])
    after = set(split([*given, PromptCompletion("new", "row")], 0.2)[1])
    assert len(before ^ after) <= 2


def test_split_skips_a_group_that_is_too_large():
    given = [PromptCompletion("the same", str(n)) for n in range(80)] + groups(20, 1)
    for seed in range(8):
        assert len(split(given, 0.1, seed=seed)[1]) == 10


@pytest.mark.parametrize("holdout", [0, -1, 0.0, 1.0, 1.5, True, 40, 41])
def test_split_refuses_nonsense(holdout):
    with pytest.raises(UserError, match="split"):
        split(groups(40, 1), holdout)


def test_split_refuses_one_prompt():
    with pytest.raises(UserError, match="1 distinct prompts"):
        split([PromptCompletion("p", str(n)) for n in range(10)], 0.1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdefg"), st.text(max_size=3)), min_size=4), st.integers(0, 3), st.data())
def test_any_split_parts_no_prompt_and_loses_nothing(pairs, seed, data):
    given_examples = [PromptCompletion(prompt, completion, row=n + 1) for n, (prompt, completion) in enumerate(pairs)]
    holdout = data.draw(st.integers(1, len(pairs) - 1))
    try:
        train, held = split(given_examples, holdout, seed)
    except UserError:
        return
    assert sorted(e.row for e in [*train, *held]) == list(range(1, len(pairs) + 1))
    assert train
    assert held
    assert not {e.prompt for e in train} & {e.prompt for e in held}


def test_prompt_keys():
    assert PromptCompletion(" a \n b", "x").prompt_key() == PromptCompletion("a b", "y").prompt_key()
    one = Conversation((Message("system", "s"), user("a"), answer("x"), user("b"), answer("y")))
    assert one.prompt_key() == Conversation((user("a"), answer("z"))).prompt_key() == ("a",)
    greeted = Conversation((answer("Hello!"), user("a"), answer("x")))
    assert greeted.prompt_key() == ("a",)
    assert Labelled("a", "b", 1).prompt_key() != Labelled("a", None, 1).prompt_key()
    assert Text("a b").prompt_key() == ("a b",)


def test_take():
    given = groups(20, 1)
    assert take(given, 3) == given[:3]
    assert take(given, None) == take(given, 99) == given
    sample = take(given, 5, seed=3)
    assert sample == take(given, 5, seed=3) != take(given, 5, seed=4)
    assert sample == [e for e in given if e in sample]
    with pytest.raises(UserError, match="limit=0"):
        take(given, 0)


def test_split_and_take_are_pinned():
    given = [Text(f"t{number}", row=number) for number in range(50)]
    assert [example.row for example in split(given, 6, seed=5)[1]] == [10, 11, 15, 21, 30, 40]
    assert [example.row for example in take(given, 6, seed=5)] == [10, 15, 18, 19, 27, 40]
