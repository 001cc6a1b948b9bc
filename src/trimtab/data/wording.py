"""How an example is written as one string, by a chat template or plainly, and which of its characters are learned."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trimtab.core.errors import UserError, listing, nearest
from trimtab.data.examples import Conversation, Example, Labelled, Message, PromptCompletion, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["auto", "chat", "plain"]


def wording_of(tokenizer: PreTrainedTokenizerBase, template: str, separator: str) -> Chat | Plain:
    """How rows are written: by the tokenizer's template or plainly; a choice that cannot be is an error."""
    check_choice("template", template, ("auto", "chat", "plain"))
    has = bool(getattr(tokenizer, "chat_template", None))
    if template == "chat" and not has:
        raise UserError(
            "template='chat', but the tokenizer has no chat template",
            fix="template='plain', or set tokenizer.chat_template",
        )
    if not has or template == "plain":
        return Plain(tokenizer, separator)
    if separator:
        raise UserError(
            f"separator={separator!r} has no place in a chat template", fix="leave it out, or template='plain'"
        )
    return Chat(tokenizer)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """An error that names the nearest of the choices where a value is none of them."""
    if value not in choices:
        near = nearest(str(value), choices, 1)
        fix = f"{name}={near[0]!r}" if near else "pass one of these"
        raise UserError(f"unknown {name} {value!r}; known: {listing(choices)}", fix=fix)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot tell where its tokens stand."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{type(tokenizer).__name__} cannot tell which characters a token stands for; masks need a fast tokenizer",
            fix="load it with AutoTokenizer, or convert it to tokenizer.json",
        )


class Refused(Exception):
    """An example that a template cannot render, or cannot be aligned in."""


@dataclass(frozen=True)
class Layout:
    """A sequence as one string, with the spans of characters to train."""

    text: str
    spans: tuple[tuple[int, int], ...]
    open_turn: bool = False
    """Some trained turn has no end-of-turn token."""
    rewritten: bool = False
    """The template changed the words of a trained turn."""
    touching: bool = False
    """Prompt and completion meet without white space."""


class Chat:
    """A tokenizer's chat template, and what one probe tells about it."""

    name = "chat"
    separator = ""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        try:
            self.source: str = tokenizer.get_chat_template()
        except ValueError as error:
            raise UserError(
                f"the tokenizer has several chat templates and none is the default: {listing(tokenizer.chat_template)}",
                fix="set tokenizer.chat_template to one of them",
            ) from error
        question = [{"role": "user", "content": "Question"}]
        try:
            prompt = self.render(question, generate=True)
            whole = self.render([*question, {"role": "assistant", "content": "Alpha"}])
        except Refused as refused:
            raise UserError(
                f"the chat template fails on one question and its answer: {refused}", fix="mend the template"
            ) from refused
        shared = common(prompt, whole)
        self.surplus = prompt[shared:]
        """What the generation prompt ends with, but no training text holds: an opened `<think>`."""
        self.gap, found, ending = whole[shared:].partition("Alpha")
        """What the template puts between generation prompt and answer."""
        if not found:
            raise UserError("the chat template does not render the assistant's words", fix="mend the template")
        self.closes = bool(ending.strip())
        """Whether something visible ends an assistant turn."""

    def render(self, messages: list[dict[str, str]], generate: bool = False) -> str:
        try:
            rendered: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        except Exception as error:  # a template is foreign code: whatever it raises is about this conversation
            raise Refused(str(error).strip().split("\n")[0] or type(error).__name__) from error
        return rendered

    def opening(self, messages: list[dict[str, str]]) -> str:
        """What stands before the assistant's next words: the generation prompt, as far as training text holds it."""
        if messages:
            prompt = self.render(messages, generate=True)
            return prompt.removesuffix(self.surplus) if self.surplus else prompt
        probes = [self.render([{"role": "assistant", "content": word}]) for word in ("Alpha", "Beta")]
        return probes[0][: common(*probes)]

    def opening_ids(self, opening: str) -> list[int]:
        ids: list[int] = self.tokenizer(opening, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def layout(self, example: Example, train_on: str) -> Layout:
        messages = as_messages(example)
        turns = learned_turns(example)
        if train_on == "all":
            whole = self.render(messages)
            return Layout(whole, ((0, len(whole)),))
        messages = messages[: turns[-1] + 1]
        whole = self.render(messages)
        found = [self._span(messages, turn, whole) for turn in turns]
        return Layout(
            whole,
            tuple((start, end) for start, end, _, _ in found),
            open_turn=any(not closed for _, _, closed, _ in found),
            rewritten=any(rewritten for _, _, _, rewritten in found),
        )

    def _span(self, messages: list[dict[str, str]], turn: int, whole: str) -> tuple[int, int, bool, bool]:
        """Where an assistant turn stands in the whole text: start, end, whether it is closed, and whether reworded."""
        words = messages[turn]["content"].strip()
        through = self.render(messages[: turn + 1]) if turn + 1 < len(messages) else whole
        opening = self.opening(messages[:turn])
        if not through.startswith(opening):
            shared = common(opening, through)
            closed = self.render(messages[:turn]) if turn else ""
            if shared < len(closed) or not opening.startswith(closed):
                raise Refused(f"turn {turn + 1}: the template writes earlier turns differently once it follows")
            opening = opening[:shared]
        start = len(opening)
        spoken = through[start:]
        if whole.startswith(through):
            end = start + len(spoken.rstrip() if self.closes else spoken)
            return start, end, self.closes, words not in spoken
        rest = whole[start:] if whole.startswith(opening) else ""
        for said in (messages[turn]["content"], words):
            for gap in (self.gap, spoken.partition(said)[0]):
                for before in (gap, ""):
                    if spoken.startswith(gap + said) and rest.startswith(before + said):
                        ending, after = spoken[len(gap + said) :], len(before + said)
                        ending = ending[: common(ending, rest[after:])]
                        visible = bool(ending.strip())
                        return start, start + after + len(ending.rstrip() if visible else ending), visible, False
        raise Refused(f"turn {turn + 1}: the template writes it differently once later turns follow")


class Plain:
    """Prompt, completion and end-of-sequence token, with no template."""

    name = "plain"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, separator: str) -> None:
        self.tokenizer = tokenizer
        self.separator = separator
        self.source = f"plain, separator {separator!r}"

    def prompt(self, example: Example) -> str:
        """What stands before the completion."""
        if isinstance(example, PromptCompletion):
            return (example.system + "\n\n" if example.system.strip() else "") + example.prompt + self.separator
        if isinstance(example, Conversation):
            *asked, answer = example.messages
            if answer.role != "assistant" or any(message.role == "assistant" for message in asked):
                raise Refused("a conversation of several answers, or with none at its end, needs a chat template")
            return "\n\n".join(message.content for message in asked) + "\n" * bool(asked)
        return example.text if isinstance(example, Text) else ""

    def opening_ids(self, opening: str) -> list[int]:
        return without_end(self.tokenizer(opening, verbose=False)["input_ids"], self.tokenizer, True)

    def layout(self, example: Example, train_on: str) -> Layout:
        if isinstance(example, Text):
            return Layout(example.text, ((0, len(example.text)),))
        if isinstance(example, Conversation):
            last = learned_turns(example)[-1]
            example = Conversation(example.messages[: last + 1])
        prompt = self.prompt(example)
        completion = (
            example.completion if isinstance(example, PromptCompletion) else as_messages(example)[-1]["content"]
        )
        text = prompt + completion
        touching = not (prompt[-1:].isspace() or completion[:1].isspace())
        return Layout(text, ((0 if train_on == "all" else len(prompt), len(text)),), touching=touching)


def inference_prompt(
    example: Example | Sequence[Message | Mapping[str, str]] | str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: Template = "auto",
    separator: str = "",
    encoder: bool = False,
) -> list[int]:
    """The ids to generate from: those the training row starts with, up to the answer.

    With `encoder` they are what an encoder-decoder reads of an example: its prompt without a template, and its end.

    An example is cut before its last answer; messages must end with what is to be answered; a string is one user
    message (without a template: the prompt itself). The ids are those the row's encoding starts with, but for rows that
    the report counts as `prompt_differs`: there the tokenizer joins the prompt's end with what follows.
    """
    check_tokenizer(tokenizer)
    if isinstance(example, Labelled):
        raise UserError("inference_prompt: a labelled example has no answer to generate", fix="encode it instead")
    if encoder and isinstance(example, PromptCompletion | Conversation):
        return source_ids(Plain(tokenizer, separator).prompt(example), tokenizer)
    wording = wording_of(tokenizer, "plain" if isinstance(example, Text) else template, separator)
    messages: list[dict[str, str]] = []
    if isinstance(example, Text | str | PromptCompletion):
        prompt = example if isinstance(example, str) else example.text if isinstance(example, Text) else example.prompt
        system = example.system if isinstance(example, PromptCompletion) else ""
        if not isinstance(wording, Chat):
            given = Text(prompt) if isinstance(example, Text) else PromptCompletion(prompt, "", system)
            return wording.opening_ids(wording.prompt(given))
        messages = as_messages(PromptCompletion(prompt, "", system))[:-1]
    elif isinstance(example, Conversation):
        messages = as_messages(example)
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))
        messages = messages[:last]
    elif not isinstance(example, Example):
        messages = [as_dict(message) for message in example]
        if not messages or messages[-1]["role"] == "assistant":
            raise UserError(
                "inference_prompt: the messages do not end with one to answer", fix="end with a user message"
            )
    if isinstance(wording, Chat):
        try:
            return wording.opening_ids(wording.opening(messages))
        except Refused as refused:
            raise UserError(f"inference_prompt: the chat template refuses the messages: {refused}") from refused
    turns = tuple(Message(message["role"], message["content"]) for message in messages)
    try:
        return wording.opening_ids(wording.prompt(Conversation((*turns, Message("assistant", "")))))
    except Refused as refused:
        raise UserError(f"inference_prompt: {refused}", fix="use a tokenizer with a chat template") from refused


def source_ids(text: str, tokenizer: PreTrainedTokenizerBase, *, separator: str = "") -> list[int]:
    """What an encoder-decoder reads to answer a prompt: the ids its training row had."""
    ids: list[int] = tokenizer(text + separator, verbose=False)["input_ids"]
    return ids


def fingerprint(
    tokenizer: PreTrainedTokenizerBase, *, template: Template = "auto", separator: str = "", worded: bool = True
) -> str:
    """sha256 over the template's text, the vocabulary and the special ids: what has to agree between two tokenizers.

    Rows that no template words (labelled ones) have the fingerprint without it: `worded=False`.
    """
    return fingerprint_of(tokenizer, wording_of(tokenizer, template, separator).source if worded else "")


def require_same_words(tokenizer: PreTrainedTokenizerBase, trained_with: str, where: str) -> None:
    """Refuse a tokenizer or chat template other than the one an adapter was trained with, if it was with a template."""
    found = {fingerprint(tokenizer), fingerprint(tokenizer, worded=False), fingerprint(tokenizer, template="plain")}
    if trained_with not in found:
        raise UserError(
            f"{where}: its tokenizer or chat template is not the one this adapter was trained with "
            f"(trained with {trained_with[:12]}, found {min(found)[:12]}), so prompts would be worded otherwise",
            fix="put the tokenizer files of the base back as they were, or train again",
        )


def fingerprint_of(tokenizer: PreTrainedTokenizerBase, source: str) -> str:
    """As `fingerprint`, with the template's text given."""
    digest = hashlib.sha256(source.encode() + b"\0")
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{number}\t{token}\n".encode("utf-8", "surrogatepass"))
    names = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    digest.update(repr([getattr(tokenizer, f"{name}_token_id", None) for name in names]).encode())
    return digest.hexdigest()


def as_dict(message: Message | Mapping[str, str]) -> dict[str, str]:
    """A message as templates take it."""
    if isinstance(message, Message):
        return {"role": message.role, "content": message.content}
    if not {"role", "content"} <= set(message):
        raise UserError(
            f"a message has {listing(message) or 'nothing'}, expected role and content", fix="add what misses"
        )
    return {"role": message["role"], "content": message["content"]}


def as_messages(example: Example) -> list[dict[str, str]]:
    """The messages of a conversation or of a prompt and its completion."""
    if isinstance(example, PromptCompletion):
        system = [{"role": "system", "content": example.system}] if example.system.strip() else []
        user = {"role": "user", "content": example.prompt}
        return [*system, user, {"role": "assistant", "content": example.completion}]
    return [as_dict(message) for message in example.messages] if isinstance(example, Conversation) else []


def learned_turns(example: Example) -> list[int]:
    """Which messages are to be learned: assistant turns that are trained and not blank."""
    if isinstance(example, PromptCompletion):
        return [len(as_messages(example)) - 1] if example.completion.strip() else []
    if isinstance(example, Conversation):
        return [
            index
            for index, message in enumerate(example.messages)
            if message.role == "assistant" and message.trained and message.content.strip()
        ]
    return []


def own_texts(example: Example) -> list[str]:
    """The texts of an example that are its own, not the template's."""
    if isinstance(example, Text):
        return [example.text]
    if isinstance(example, Labelled):
        return [example.text, example.pair or ""]
    return [message["content"] for message in as_messages(example)]


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """What finds the words of special tokens in a text; None where there are none."""
    words = {str(token) for token in tokenizer.all_special_tokens}
    words |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    longest_first = sorted((word for word in words if word.strip()), key=lambda word: (-len(word), word))
    return re.compile("|".join(re.escape(word) for word in longest_first)) if longest_first else None


def without_end(ids: list[int], tokenizer: PreTrainedTokenizerBase, plain: bool) -> list[int]:
    """The ids but for an end-of-sequence token that the tokenizer put behind plain text."""
    return ids[:-1] if plain and ids[-1:] == [tokenizer.eos_token_id] else ids


def common(first: str, second: str) -> int:
    """The length of the longest common start."""
    shorter = min(len(first), len(second))
    return next((place for place in range(shorter) if first[place] != second[place]), shorter)
