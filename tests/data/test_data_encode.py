"""The mask is right for every template: the trained tokens are the answers and their end-of-turn tokens, no more."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trimtab.core.errors import UserError
from trimtab.data.encode import encode, encode_all
from trimtab.data.examples import Conversation, Labelled, Message, PromptCompletion, Text
from trimtab.data.wording import fingerprint, inference_prompt

QUESTION = PromptCompletion("What is the capital of France?", "Paris.")
CHAT = Conversation(
    (
        Message("user", "What is 2+2?"),
        Message("assistant", "Four."),
        Message("user", "And 3+3?"),
        Message("assistant", "Six ☃."),
    )
)

LEARNED = {
    "chatml": ("<|im_end|>", "Paris.<|im_end|>", "Four.<|im_end|>Six ☃.<|im_end|>"),
    "default system": ("<|im_end|>", "Paris.<|im_end|>", "Four.<|im_end|>Six ☃.<|im_end|>"),
    "llama": ("<|eot|>", "Paris.<|eot|>", "Four.<|eot|>Six ☃.<|eot|>"),
    "inst": ("</s>", " Paris.</s>", " Four.</s> Six ☃.</s>"),
    "thinking last": (
        "<|im_end|>",
        "<think>\n\n</think>\n\nParis.<|im_end|>",
        "Four.<|im_end|><think>\n\n</think>\n\nSix ☃.<|im_end|>",
    ),
    "thinking prompt": ("<|eot|>", "Paris.<|eot|>", "Four.<|eot|>Six ☃.<|eot|>"),
    "end only last": ("</s>", "Paris.\n</s>", "Four.\nSix ☃.\n</s>"),
    "no end": ("</s>", "Paris.\n", "Four.\nSix ☃.\n"),
}


@pytest.fixture(params=list(LEARNED))
def dressed(request, make_tokenizer, templates):
    """A tokenizer with a template (and a start token of its own for llama), and what it should learn."""
    end, single, double = LEARNED[request.param]
    return make_tokenizer(templates[request.param], end, request.param == "llama"), single, double


def test_what_is_learned_of_one_answer(dressed, learned_text):
    tokenizer, single, _ = dressed
    item = encode(QUESTION, tokenizer, max_length=None)
    assert learned_text(item, tokenizer) == single


def test_what_is_learned_of_a_conversation(dressed, learned_text):
    tokenizer, _, double = dressed
    item = encode(CHAT, tokenizer, max_length=None)
    assert learned_text(item, tokenizer) == double


def test_the_whole_is_what_the_template_writes(dressed):
    tokenizer, _, _ = dressed
    messages = [{"role": message.role, "content": message.content} for message in CHAT.messages]
    expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    for train_on in ("completions", "all"):
        assert encode(CHAT, tokenizer, max_length=None, train_on=train_on).ids == expected
    assert all(encode(CHAT, tokenizer, max_length=None, train_on="all").trained)


@pytest.mark.parametrize("example", [QUESTION, CHAT])
def test_a_row_starts_with_its_inference_prompt(dressed, example):
    tokenizer, _, _ = dressed
    item = encode(example, tokenizer, max_length=None)
    prompt = inference_prompt(example, tokenizer)
    assert item.ids[: len(prompt)] == prompt
    assert item.trained[len(prompt)]
    assert len(prompt) > 3


def test_the_inference_prompt_of_messages_and_of_a_string(dressed):
    tokenizer, _, _ = dressed
    expected = inference_prompt(QUESTION, tokenizer)
    assert inference_prompt(QUESTION.prompt, tokenizer) == expected
    assert inference_prompt([Message("user", QUESTION.prompt)], tokenizer) == expected
    assert inference_prompt([{"role": "user", "content": QUESTION.prompt}], tokenizer) == expected


def test_the_inference_prompt_is_the_generation_prompt(make_tokenizer, templates):
    for name in ("chatml", "default system", "llama", "inst", "thinking last", "end only last"):
        tokenizer = make_tokenizer(templates[name], "</s>")
        messages = [{"role": "user", "content": "What is it?"}]
        expected = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
        assert inference_prompt("What is it?", tokenizer) == expected


def test_a_template_that_writes_the_start_token_gets_no_second_one(make_tokenizer, templates):
    tokenizer = make_tokenizer(templates["llama"], "<|eot|>", True)
    ids = encode(QUESTION, tokenizer, max_length=None).ids
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert inference_prompt(QUESTION, tokenizer).count(tokenizer.bos_token_id) == 1


def test_system_prompts_reach_the_template(chatml, learned_text):
    item = encode(dataclasses.replace(QUESTION, system="Be brief."), chatml, max_length=None)
    assert chatml.decode(item.ids).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")
    assert learned_text(item, chatml) == "Paris.<|im_end|>"


def test_a_conversation_that_the_assistant_opens(make_tokenizer, templates, learned_text):
    greeting = Conversation((Message("assistant", "Hello!"), *CHAT.messages))
    for name in ("chatml", "default system", "llama"):
        tokenizer = make_tokenizer(templates[name], "</s>")
        end = "<|eot|>" if name == "llama" else "<|im_end|>"
        item = encode(greeting, tokenizer, max_length=None)
        assert learned_text(item, tokenizer) == f"Hello!{end}Four.{end}Six ☃.{end}"


def test_what_follows_the_last_answer_is_left_out(chatml):
    longer = Conversation((*CHAT.messages, Message("user", "Thanks")))
    assert encode(longer, chatml, max_length=None) == encode(CHAT, chatml, max_length=None)
    assert inference_prompt(longer, chatml) == inference_prompt(CHAT, chatml)


def test_turns_not_to_be_trained(chatml, learned_text):
    first = dataclasses.replace(CHAT.messages[1], trained=False)
    example = Conversation((CHAT.messages[0], first, *CHAT.messages[2:]))
    item = encode(example, chatml, max_length=None)
    assert learned_text(item, chatml) == "Six ☃.<|im_end|>"
    assert item.ids == encode(CHAT, chatml, max_length=None).ids


def test_tool_turns_are_read_and_not_trained(chatml, learned_text):
    turns = (Message("user", "a"), Message("assistant", "call"), Message("tool", "result"), Message("assistant", "b"))
    item = encode(Conversation(turns), chatml, max_length=None)
    assert learned_text(item, chatml) == "call<|im_end|>b<|im_end|>"


def test_a_template_may_refuse_a_row(make_tokenizer, templates):
    tokenizer = make_tokenizer(templates["inst"], "</s>")
    twice = Conversation((Message("user", "a"), Message("user", "b"), Message("assistant", "c")), row=7)
    with pytest.raises(UserError, match=r"1 of 2 rows: the chat template refuses[\s\S]*row 7: roles must alternate"):
        encode_all([QUESTION, twice], tokenizer, max_length=None)
    with pytest.raises(UserError, match="roles must alternate"):
        inference_prompt([Message("user", "a"), Message("user", "b")], tokenizer)


def test_a_template_that_rewrites_earlier_turns_is_refused(make_tokenizer):
    thought = (
        "{% for m in messages %}{{ m['role'] + ':' + (m['content'] if loop.last else 'gone') + eos_token }}{% endfor %}"
    )
    tokenizer = make_tokenizer(thought + "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}")
    with pytest.raises(UserError, match="writes"):
        encode(CHAT, tokenizer, max_length=None)


def test_a_template_that_rewords_is_reported(make_tokenizer, templates):
    tokenizer = make_tokenizer(templates["thinking prompt"], "</s>")
    made = encode_all([PromptCompletion("a", "<think>hm</think>b", row=4)], tokenizer, max_length=None)
    assert any("rewords" in note and note.endswith(": 4") for note in made.report.notes)


def test_turns_without_an_end_are_reported(make_tokenizer, templates):
    for name, rows in (("no end", 2), ("end only last", 1)):
        tokenizer = make_tokenizer(templates[name], "</s>")
        report = encode_all([QUESTION, CHAT], tokenizer, max_length=None).report
        assert any(note.startswith(f"{rows} row") and "no token to stop at" in note for note in report.notes)


def test_a_generation_prompt_that_ends_in_a_space_is_reported(make_tokenizer, learned_text):
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    tokenizer = make_tokenizer(template + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    made = encode_all([QUESTION], tokenizer, max_length=None)
    assert learned_text(made[0], tokenizer) == " Paris.</s>"
    assert made.report.prompt_differs == 1


@pytest.mark.parametrize(
    "template,message",
    [
        ("{{ messages[0]['role'] }}", "does not render the assistant's words"),
        ("{{ raise_exception('never') }}", "fails on one question and its answer: never"),
        ("{% for m in messages %}", "fails on one question"),
    ],
)
def test_broken_templates(make_tokenizer, template, message):
    with pytest.raises(UserError, match=message):
        encode(QUESTION, make_tokenizer(template), max_length=None)


def test_several_templates_need_a_default(make_tokenizer, templates):
    tokenizer = make_tokenizer(templates["chatml"], "<|im_end|>")
    before = tokenizer.chat_template
    try:
        tokenizer.chat_template = {"a": before, "b": before}
        with pytest.raises(UserError, match="several chat templates"):
            encode(QUESTION, tokenizer, max_length=None)
        tokenizer.chat_template = {"default": before, "b": "x"}
        assert encode(QUESTION, tokenizer, max_length=None).targets > 1
    finally:
        tokenizer.chat_template = before


WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=150, deadline=None)
@given(prompt=WORDS, words=WORDS, trim=st.booleans())
def test_any_answer_is_learned_byte_for_byte(make_tokenizer, templates, learned_text, prompt, words, trim):
    assume(words.strip())
    tokenizer = make_tokenizer(templates["chatml"], "<|im_end|>", False, trim)
    made = encode_all([PromptCompletion(prompt, words)], tokenizer, max_length=None)
    assert learned_text(made[0], tokenizer) == words + "<|im_end|>"
    start = inference_prompt(PromptCompletion(prompt, words), tokenizer)
    assert made.report.prompt_differs == (made[0].ids[: len(start)] != start)
    assert made.report.prompt_differs == 0


@settings(max_examples=100, deadline=None)
@given(prompt=WORDS, words=WORDS, trim=st.booleans())
def test_any_plain_answer_is_learned_and_differing_prompts_are_counted(
    make_tokenizer, learned_text, prompt, words, trim
):
    assume(words.strip())
    tokenizer = make_tokenizer(None, "</s>", False, trim)
    made = encode_all([PromptCompletion(prompt, words)], tokenizer, max_length=None)
    learned = learned_text(made[0], tokenizer)
    assert tokenizer.decode(made[0].ids) == prompt + words + "</s>"
    start = inference_prompt(PromptCompletion(prompt, words), tokenizer)
    assert made.report.prompt_differs == (made[0].ids[: len(start)] != start)
    if not made.report.prompt_differs:
        assert learned == words + "</s>"
        assert made[0].trained == [False] * len(start) + [True] * (len(made[0].ids) - len(start))
    else:
        assert len(learned) >= len(words + "</s>")


TRICKY = st.sampled_from(
    ["i", "think", "<think>", "assistant", "assistant\n", "im_end", "<|im_", " a ", "\nb\n", "end|>", "user", ".", "é"]
)


@settings(max_examples=150, deadline=None)
@given(
    answers=st.lists(TRICKY, min_size=1, max_size=4), asked=TRICKY, name=st.sampled_from(["chatml", "thinking last"])
)
def test_answers_that_look_like_the_template(make_tokenizer, templates, learned_text, answers, asked, name):
    tokenizer = make_tokenizer(templates[name], "<|im_end|>")
    turns = [turn for words in answers for turn in (Message("user", asked), Message("assistant", words))]
    item = encode(Conversation(tuple(turns)), tokenizer, max_length=None)
    thought = "<think>\n\n</think>\n\n" if name == "thinking last" else ""
    expected = "<|im_end|>".join([*answers[:-1], thought + answers[-1], ""])
    assert learned_text(item, tokenizer) == expected
    prompt = inference_prompt(Conversation(tuple(turns)), tokenizer)
    assert item.ids[: len(prompt)] == prompt


def test_plain_prompt_and_completion(plain, learned_text):
    example = PromptCompletion("The capital of France is", " Paris.")
    item = encode(example, plain, max_length=None)
    assert plain.decode(item.ids) == "The capital of France is Paris.</s>"
    assert learned_text(item, plain) == " Paris.</s>"
    prompt = inference_prompt(example, plain)
    assert item.ids[: len(prompt)] == prompt
    assert inference_prompt(example.prompt, plain) == prompt


def test_plain_start_token(plain_with_start, learned_text):
    example = PromptCompletion("The capital of France is", " Paris.")
    item = encode(example, plain_with_start, max_length=None)
    assert plain_with_start.decode(item.ids) == "<s>The capital of France is Paris.</s>"
    assert learned_text(item, plain_with_start) == " Paris.</s>"
    assert inference_prompt(example, plain_with_start) == item.ids[: item.trained.index(True)]
    text = encode(Text("The cat"), plain_with_start, max_length=None)
    assert plain_with_start.decode(text.ids) == "<s>The cat</s>"
    assert inference_prompt(Text("The cat"), plain_with_start) == text.ids[:-1]


def test_an_end_token_that_the_tokenizer_adds_is_not_doubled(make_tokenizer):
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    source = make_tokenizer(None)
    inner = type(source.backend_tokenizer).from_str(source.backend_tokenizer.to_str())
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", source.eos_token_id)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    item = encode(PromptCompletion("a", " b"), tokenizer, max_length=None)
    assert tokenizer.decode(item.ids) == "a b</s>"
    assert item.trained == [False, True, True, True]
    assert tokenizer.decode(inference_prompt("a", tokenizer)) == "a"


def test_plain_system_prompt_and_separator(plain, learned_text):
    example = PromptCompletion("Where?", "Here.", system="Be brief.")
    item = encode(example, plain, max_length=None, separator="\n")
    assert plain.decode(item.ids) == "Be brief.\n\nWhere?\nHere.</s>"
    assert learned_text(item, plain) == "Here.</s>"
    assert inference_prompt(example, plain, separator="\n") == item.ids[: item.trained.index(True)]


def test_plain_conversation_of_one_answer(plain, learned_text):
    example = Conversation((Message("system", "Be brief."), Message("user", "Where?"), Message("assistant", "Here.")))
    item = encode(example, plain, max_length=None)
    assert plain.decode(item.ids) == "Be brief.\n\nWhere?\nHere.</s>"
    assert learned_text(item, plain) == "Here.</s>"
    assert inference_prompt(example, plain) == item.ids[: item.trained.index(True)]
    assert inference_prompt(example.messages[:2], plain) == inference_prompt(example, plain)


def test_plain_conversation_of_several_answers_is_refused(plain):
    with pytest.raises(UserError, match=r"row 1: a conversation of several answers[\s\S]*chat_template"):
        encode(CHAT, plain, max_length=None)
    with pytest.raises(UserError, match="several answers"):
        inference_prompt(CHAT.messages[:3], plain)


def test_a_token_across_the_boundary_is_trained_and_reported(plain, learned_text):
    example = PromptCompletion("The c", "at sat", row=12)
    made = encode_all([example], plain, max_length=None)
    assert learned_text(made[0], plain) == " cat sat</s>"
    assert made.report.prompt_differs == 1
    assert any("splits into other tokens: 12" in note for note in made.report.notes)
    assert any("meet without white space" in note for note in made.report.notes)


def test_texts_are_learned_whole(plain, chatml):
    item = encode(Text("The cat sat."), plain, max_length=None)
    assert plain.decode(item.ids) == "The cat sat.</s>"
    assert all(item.trained)
    assert item.targets == len(item.ids) - 1
    item = encode(Text("The cat sat."), chatml, max_length=None)
    assert chatml.decode(item.ids) == "The cat sat.<|im_end|>"


def test_a_template_can_be_set_aside(chatml, plain):
    made = encode_all([QUESTION], chatml, max_length=None, template="plain")
    assert chatml.decode(made[0].ids) == "What is the capital of France?Paris.<|im_end|>"
    assert made.report.template == "plain"
    with pytest.raises(UserError, match="no chat template"):
        encode(QUESTION, plain, max_length=None, template="chat")
    with pytest.raises(UserError, match="no place in a chat template"):
        encode(QUESTION, chatml, max_length=None, separator="\n")


LONG = [Text("The cat sat on the mat and looked at the moon. " * count, row=count) for count in (1, 4, 2, 9)]


def test_over_long_rows_are_an_error_that_names_them(plain):
    lengths = [len(encode(row, plain, max_length=None).ids) for row in LONG]
    with pytest.raises(UserError) as caught:
        encode_all(LONG, plain, max_length=lengths[0])
    longest = lengths[3]
    message = str(caught.value)
    assert f"3 of 4 rows are longer than max_length={lengths[0]} tokens: rows 4, 2, 9" in message
    assert f"the longest is row 9 with {longest} tokens" in message
    assert f"max_length={longest}" in message
    assert "'split'" in message


def test_drop(plain):
    limit = len(encode(LONG[2], plain, max_length=None).ids)
    made = encode_all(LONG, plain, max_length=limit, truncation="drop")
    assert [item.row for item in made] == [1, 2]
    assert (made.report.dropped, made.report.over_long, made.report.truncated) == (2, 2, 0)
    assert any(note.endswith("left out: 4, 9") for note in made.report.notes)


def test_right_and_left(plain_with_start):
    whole = encode(LONG[3], plain_with_start, max_length=None)
    right = encode(LONG[3], plain_with_start, max_length=20, truncation="right")
    assert right.ids == whole.ids[:20]
    left = encode(LONG[3], plain_with_start, max_length=20, truncation="left")
    assert left.ids == [whole.ids[0], *whole.ids[-19:]]
    assert left.ids[-1] == plain_with_start.eos_token_id
    report = encode_all(LONG, plain_with_start, max_length=20, truncation="right").report
    assert report.truncated == report.over_long > 0
    assert report.longest == len(whole.ids)


def test_a_cut_that_leaves_nothing_to_learn(chatml):
    long = PromptCompletion("The cat sat. " * 30, "Paris.", row=5)
    made = encode_all([QUESTION, long], chatml, max_length=60, truncation="right")
    assert (made.report.masked, made.report.truncated, len(made)) == (1, 0, 1)
    assert any("no trained token left" in note and note.endswith(": 5") for note in made.report.notes)
    with pytest.raises(UserError, match=r"not one token of 1 rows would be trained: 1 lost every trained token"):
        encode_all([long], chatml, max_length=60, truncation="right")
    assert encode_all([long], chatml, max_length=60, truncation="left").report.truncated == 1


@settings(max_examples=80, deadline=None)
@given(words=WORDS, times=st.integers(1, 5), limit=st.integers(2, 12), start=st.booleans())
def test_split_predicts_every_token_exactly_once(make_tokenizer, words, times, limit, start):
    text = words * times
    assume(text.strip())
    tokenizer = make_tokenizer(None, "</s>", start)
    whole = encode(Text(text), tokenizer, max_length=None)
    made = encode_all([Text(text)], tokenizer, max_length=limit, truncation="split")
    assert all(len(item.ids) <= limit for item in made)
    predicted = [token for item in made for token, on in zip(item.ids[1:], item.trained[1:], strict=True) if on]
    assert predicted == whole.ids[1:]
    assert made.report.split == (len(whole.ids) > limit)
    if start:
        assert all(item.ids[0] == tokenizer.bos_token_id for item in made)


def test_policies_and_lengths_are_checked(plain):
    with pytest.raises(UserError, match=r"unknown truncation 'rigth'.*\n.*'right'"):
        encode_all(LONG, plain, max_length=9, truncation="rigth")
    with pytest.raises(UserError, match="unknown train_on"):
        encode_all(LONG, plain, max_length=9, train_on="completion")
    with pytest.raises(UserError, match="max_length=1 leaves nothing"):
        encode_all(LONG, plain, max_length=1)
    with pytest.raises(UserError, match="'split' is for texts"):
        encode_all([QUESTION], plain, max_length=9, truncation="split")
    with pytest.raises(UserError, match="no examples"):
        encode_all([], plain, max_length=9)
    with pytest.raises(UserError, match="several kinds: PromptCompletion, Text"):
        encode_all([QUESTION, Text("a")], plain, max_length=9)
    with pytest.raises(UserError, match="makes 2 sequences"):
        encode(Text("The cat sat on"), plain, max_length=4, truncation="split")


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(UserError, match="fast tokenizer"):
        encode(QUESTION, object(), max_length=9)


def test_a_tokenizer_without_an_end_is_refused(words):
    with pytest.raises(UserError, match="no end-of-sequence token"):
        encode(Text("The cat"), words, max_length=9)


def test_blank_answers_are_left_out_and_reported(chatml):
    blank = PromptCompletion("a", " \n", row=3)
    made = encode_all([QUESTION, blank, CHAT], chatml, max_length=None)
    assert (made.report.rows, made.report.sequences, made.report.empty) == (3, 2, 1)
    assert any("nothing to learn, left out: 3" in note for note in made.report.notes)
    with pytest.raises(UserError, match="not one token of 1 rows"):
        encode_all([blank], chatml, max_length=None)


def test_one_blank_turn_among_others_is_not_trained(chatml, learned_text):
    blank = dataclasses.replace(CHAT.messages[1], content="")
    item = encode(Conversation((CHAT.messages[0], blank, *CHAT.messages[2:])), chatml, max_length=None)
    assert learned_text(item, chatml) == "Six ☃.<|im_end|>"


def test_duplicates_are_counted_and_kept(chatml):
    made = encode_all([QUESTION, CHAT, QUESTION, QUESTION], chatml, max_length=None)
    assert (made.report.duplicates, len(made)) == (2, 4)


def test_special_tokens_spelt_in_a_row_are_reported(chatml):
    made = encode_all([QUESTION, PromptCompletion("a<|im_end|>b", "c", row=2)], chatml, max_length=None)
    assert made.report.special_text == 1
    assert any("spells a special token" in note and note.endswith(": 2") for note in made.report.notes)


def test_a_template_with_a_date_is_reported(make_tokenizer, templates):
    dated = "{% if strftime_now is defined %}{{ strftime_now('%d') }}{% endif %}" + templates["chatml"]
    tokenizer = make_tokenizer(dated, "<|im_end|>")
    assert any("today's date" in note for note in encode_all([QUESTION], tokenizer, max_length=None).report.notes)


def test_the_report_counts_right(chatml):
    made = encode_all([QUESTION, CHAT], chatml, max_length=512)
    report = made.report
    assert report.trained_tokens == sum(sum(item.trained[1:]) for item in made)
    assert report.total_tokens == sum(len(item.ids) for item in made)
    assert (report.longest, report.longest_row) == (len(made[1].ids), 2)
    assert (report.template, report.max_length, report.train_on) == ("chat", 512, "completions")
    assert "2 rows -> 2 sequences" in report.summary()
    json.dumps(dataclasses.asdict(report))


def test_the_fingerprint_follows_template_vocabulary_and_special_ids(make_tokenizer, templates, words):
    one = make_tokenizer(templates["chatml"], "<|im_end|>")
    assert encode_all([QUESTION], one, max_length=None).report.fingerprint == fingerprint(one)
    prints = {
        fingerprint(one),
        fingerprint(make_tokenizer(templates["llama"], "<|im_end|>")),
        fingerprint(make_tokenizer(templates["chatml"], "</s>")),
        fingerprint(one, template="plain"),
        fingerprint(one, template="plain", separator="\n"),
        fingerprint(words),
    }
    assert len(prints) == 6
    assert len(fingerprint(one)) == 64


def test_labelled_texts_and_pairs(words):
    made = encode_all([Labelled("The cat", None, "no"), Labelled("Paris", None, "yes")], words, max_length=16)
    assert words.convert_ids_to_tokens(made[0].ids) == ["[CLS]", "The", "cat", "[SEP]"]
    assert made.labels == ("no", "yes")
    assert [item.label for item in made] == [0, 1]
    assert made.report.trained_tokens == 2
    pair = encode(Labelled("The cat", "the mat", 0.5), words, max_length=16)
    assert words.convert_ids_to_tokens(pair.ids) == ["[CLS]", "The", "cat", "[SEP]", "the", "mat", "[SEP]"]
    assert pair.types == [0, 0, 0, 0, 1, 1, 1]
    assert pair.label == 0.5


@pytest.mark.parametrize(
    "labels,expected",
    [
        ([10, 9, 2], (2, 9, 10)),
        (["10", "9", "2"], ("2", "9", "10")),
        (["b", "a"], ("a", "b")),
        ([True, False], (False, True)),
        ([0.5, 1.0], "regression"),
    ],
)
def test_the_classes_of_a_training_set(words, labels, expected):
    assert encode_all([Labelled("The", None, label) for label in labels], words, max_length=9).labels == expected


def test_held_out_labels_are_those_of_training(words):
    train = encode_all([Labelled("The", None, label) for label in ("a", "b")], words, max_length=9)
    held = encode_all([Labelled("The", None, "b")], words, max_length=9, labels=train.labels)
    assert (held[0].label, held.labels) == (1, ("a", "b"))
    with pytest.raises(UserError, match=r"training did not have \(a, b\):\n  row 9: 'B' \(nearest: b\)"):
        encode_all([Labelled("The", None, "B", row=9)], words, max_length=9, labels=train.labels)
    assert encode_all([Labelled("The", None, 1)], words, max_length=9, labels=("1", "2"))[0].label == 0
    scores = encode_all([Labelled("The", None, 3)], words, max_length=9, labels="regression")
    assert scores[0].label == 3.0
    with pytest.raises(UserError, match="'x' is not a number"):
        encode_all([Labelled("The", None, "x")], words, max_length=9, labels="regression")
    with pytest.raises(UserError, match="does not tell the classes"):
        encode(Labelled("The", None, "a"), words, max_length=9)


def test_over_long_labelled_rows(words):
    rows = [Labelled("The cat sat on the mat", "the moon", 1, row=4), Labelled("The", "cat", 0, row=5)]
    with pytest.raises(UserError, match=r"1 of 2 rows is longer than max_length=8 tokens: row 4"):
        encode_all(rows, words, max_length=8)
    made = encode_all(rows, words, max_length=8, truncation="right")
    tokens = words.convert_ids_to_tokens(made[0].ids)
    assert len(tokens) == 8
    assert (tokens[0], tokens.count("[SEP]")) == ("[CLS]", 2)
    assert made.report.truncated == 1
    assert [item.row for item in encode_all(rows, words, max_length=8, truncation="drop")] == [5]
    with pytest.raises(UserError, match="not for pairs"):
        encode_all(rows, words, max_length=8, truncation="left")
    single = [Labelled("The cat sat on the mat", None, 1)]
    left = encode_all(single, words, max_length=4, truncation="left")
    assert words.convert_ids_to_tokens(left[0].ids) == ["[CLS]", "the", "mat", "[SEP]"]
    assert words.truncation_side == "right"
    with pytest.raises(UserError, match="no answer to generate"):
        inference_prompt(single[0], words)


def test_prompts_that_cannot_be_answered(chatml):
    with pytest.raises(UserError, match="do not end with one to answer"):
        inference_prompt(CHAT.messages, chatml)
    with pytest.raises(UserError, match="do not end with one to answer"):
        inference_prompt([], chatml)
    with pytest.raises(UserError, match="expected role and content"):
        inference_prompt([{"from": "human"}], chatml)


def test_many_rows_are_the_same_as_one_by_one(chatml, monkeypatch):
    rows = [PromptCompletion(f"Question {n}", "word " * n + "end", row=n + 1) for n in range(20)]
    monkeypatch.setattr("trimtab.data.encode.CHUNK", 7)
    together = encode_all(rows, chatml, max_length=None)
    assert list(together) == [encode(row, chatml, max_length=None) for row in rows]
    assert together[1:3] == together.items[1:3]
