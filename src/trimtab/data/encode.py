"""From examples to token ids, and the mask that says which of them are learned."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, overload

from trimtab.core.errors import UserError, listing, nearest
from trimtab.data.forms import Conversation, Example, Label, Labelled, Message, PromptCompletion, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Truncation = Literal["error", "drop", "left", "right", "split"]
TrainOn = Literal["completions", "all"]
Template = Literal["auto", "chat", "plain"]
Labels = tuple[Label, ...] | Literal["regression"]
"""The classes in the order of their numbers, or that labels are numbers to regress to."""

CHUNK = 256
"""Examples tokenised in one call."""


@dataclass(frozen=True)
class Encoded:
    """One sequence: its ids, which of them are learned, or its label; `types` are segment ids where a pair has them."""

    ids: list[int]
    trained: list[bool]
    label: int | float | None = None
    types: list[int] | None = None
    row: int = 0
    source: list[int] | None = None
    """What an encoder-decoder reads; `ids` are then its start token and what it is to write."""

    @property
    def targets(self) -> int:
        """How many of its positions a causal model is trained to predict: the first token never is."""
        return sum(self.trained[1:])


@dataclass(frozen=True)
class Report:
    """What became of the examples; every row that was cut, split or left out is counted here."""

    rows: int
    """Examples given."""
    sequences: int
    """Sequences made of them."""
    over_long: int
    """Rows of more than `max_length` tokens."""
    truncated: int
    """Over-long rows that were cut."""
    dropped: int
    """Over-long rows that were left out."""
    split: int
    """Over-long rows that were cut in several sequences, with nothing lost."""
    masked: int
    """Rows left out since cutting took every trained token."""
    empty: int
    """Rows left out since they have nothing to learn: a blank completion, or no trained assistant turn."""
    duplicates: int
    """Sequences equal to an earlier one; they are kept."""
    prompt_differs: int
    """Rows whose last prompt, alone as in generation, splits into other tokens than before its completion."""
    special_text: int
    """Rows whose own text spells a special token, so that it is read as one."""
    trained_tokens: int
    """Positions predicted after the causal shift; for labelled rows, labels."""
    total_tokens: int
    longest: int
    """Tokens of the longest row, before any cut."""
    longest_row: int
    max_length: int | None
    truncation: str
    train_on: str
    template: str
    """chat, plain, or none for labelled rows."""
    separator: str
    fingerprint: str
    notes: tuple[str, ...] = ()
    """What a person should read before training, one sentence each."""

    def summary(self) -> str:
        """A few lines for people."""
        cut = ", ".join(
            f"{count} {what}"
            for count, what in (
                (self.truncated, f"truncated ({self.truncation})"),
                (self.dropped, "dropped as over-long"),
                (self.split, "split"),
                (self.masked, "left with nothing trained"),
                (self.empty, "empty"),
                (self.duplicates, "duplicates kept"),
            )
            if count
        )
        share = self.trained_tokens / max(1, self.total_tokens)
        trained = f"{self.trained_tokens} of {self.total_tokens} tokens trained ({share:.0%})"
        if self.template == "none":
            trained = f"{self.total_tokens} tokens, {self.trained_tokens} labels"
        longest = f"longest {self.longest} (row {self.longest_row})"
        first = f"{self.rows} rows -> {self.sequences} sequences; {trained}; {longest}"
        return "\n".join([first, cut or "nothing cut or left out", *(f"note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class EncodedSet(Sequence[Encoded]):
    """The sequences of a data set, the labels they count by, and the report of how they came about."""

    items: tuple[Encoded, ...]
    report: Report
    labels: Labels | None = None
    """Give them to `encode_all` for held-out data, so that the same label has the same number."""

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Encoded, ...]: ...

    def __getitem__(self, index: int | slice) -> Encoded | tuple[Encoded, ...]:
        return self.items[index]


def encode(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    truncation: Truncation = "error",
    train_on: TrainOn = "completions",
    template: Template = "auto",
    separator: str = "",
    labels: Labels | None = None,
) -> Encoded:
    """Encode one example as `encode_all` does; one that would be left out or split is an error here.

    A labelled example with a class needs `labels`.
    """
    if isinstance(example, Labelled) and labels is None and not isinstance(example.label, float):
        raise UserError("encode: one labelled example does not tell the classes", fix="pass labels=, or use encode_all")
    made = encode_all(
        [example],
        tokenizer,
        max_length=max_length,
        truncation=truncation,
        train_on=train_on,
        template=template,
        separator=separator,
        labels=labels,
    )
    if len(made) != 1:
        raise UserError(f"encode: the example makes {len(made)} sequences", fix="use encode_all")
    return made.items[0]


def encode_all(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    truncation: Truncation = "error",
    train_on: TrainOn = "completions",
    template: Template = "auto",
    separator: str = "",
    labels: Labels | None = None,
    decoder_start: int | None = None,
) -> EncodedSet:
    """Encode examples, all of one kind, and report on them.

    What is trained (`train_on="completions"`): the completion of a prompt, and every assistant turn of a chat, each
    with the end-of-turn token that follows it, but not white space after that. Texts are trained whole; so is
    everything with `train_on="all"`. A blank completion teaches nothing and is left out.

    How the tokens are found: the whole sequence is written as one string and tokenised once. A chat template is
    rendered up to each assistant turn, with the generation prompt, and through it; the first must be the start of the
    second, which must be the start of the whole; what lies between is the turn. If the generation prompt holds
    something that training text does not (an opened `<think>`), or later turns change how the turn is written, the
    longest common start is taken and checked. A token with at least one character in a turn is trained, so also one
    that straddles the start of it.

    `template`: "chat" uses the tokenizer's template, and refuses one without; "plain" is prompt + separator +
    completion + end-of-sequence token, behind the beginning-of-sequence token where the tokenizer adds one; messages
    with one answer are joined by blank lines, and the answer starts a new line. "auto" is "chat" where there is a
    template. Texts are always plain.

    `truncation` of rows over `max_length` tokens (None: no limit): "error" lists them; "drop" leaves them out; "right"
    keeps the start; "left" the end, behind the beginning-of-sequence token if there is one; "split" (texts only) makes
    several sequences in which every token is still predicted exactly once. A row of which nothing trained is left is
    left out. All of it is counted in the report.

    `decoder_start` is the first token of an encoder-decoder's answers. The prompt is then the encoder's input, the
    completion with an end-of-sequence token what its decoder writes, each of at most `max_length` tokens.

    `labels` fixes the classes of labelled examples; None takes them from these ones. Pass `train.labels` for held-out
    data: a label that is not among them is an error.

    Raises `UserError` with every row at fault; also if nothing at all would be trained.
    """
    _check_choice("truncation", truncation, ("error", "drop", "left", "right", "split"))
    _check_choice("train_on", train_on, ("completions", "all"))
    if max_length is not None and (isinstance(max_length, bool) or max_length < 2):
        raise UserError(f"max_length={max_length!r} leaves nothing to predict", fix="max_length=2 or more")
    if not examples:
        raise UserError("encode: no examples", fix="give at least one")
    kinds = sorted({type(example).__name__ for example in examples})
    if len(kinds) > 1 and kinds != ["Conversation", "PromptCompletion"]:
        raise UserError(f"encode: examples of several kinds: {listing(kinds)}", fix="encode each kind on its own")
    if truncation == "split" and not isinstance(examples[0], Text):
        raise UserError(
            f"truncation='split' is for texts, not for {kinds[0]}", fix="truncation='drop', 'left' or 'right'"
        )
    _check_tokenizer(tokenizer)
    settings = _Settings(max_length, truncation, train_on)
    if isinstance(examples[0], Labelled):
        return _encode_labelled([e for e in examples if isinstance(e, Labelled)], tokenizer, settings, labels)
    if decoder_start is not None:
        return _encode_sources(examples, tokenizer, settings, _Plain(tokenizer, separator), decoder_start)
    wording = _wording(tokenizer, "plain" if isinstance(examples[0], Text) else template, separator)
    return _encode_texts(examples, tokenizer, settings, wording)


def inference_prompt(
    example: Example | Sequence[Message | Mapping[str, str]] | str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: Template = "auto",
    separator: str = "",
) -> list[int]:
    """The ids to generate from: those the training row starts with, up to the answer.

    An example is cut before its last answer; messages must end with what is to be answered; a string is one user
    message (without a template: the prompt itself). The ids are those the row's encoding starts with, but for rows that
    the report counts as `prompt_differs`: there the tokenizer joins the prompt's end with what follows.
    """
    _check_tokenizer(tokenizer)
    if isinstance(example, Labelled):
        raise UserError("inference_prompt: a labelled example has no answer to generate", fix="encode it instead")
    wording = _wording(tokenizer, "plain" if isinstance(example, Text) else template, separator)
    messages: list[dict[str, str]] = []
    if isinstance(example, Text | str | PromptCompletion):
        prompt = example if isinstance(example, str) else example.text if isinstance(example, Text) else example.prompt
        system = example.system if isinstance(example, PromptCompletion) else ""
        if not isinstance(wording, _Chat):
            given = Text(prompt) if isinstance(example, Text) else PromptCompletion(prompt, "", system)
            return wording.opening_ids(wording.prompt(given))
        messages = _as_messages(PromptCompletion(prompt, "", system))[:-1]
    elif isinstance(example, Conversation):
        messages = _as_messages(example)
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))
        messages = messages[:last]
    elif not isinstance(example, Example):
        messages = [_as_dict(message) for message in example]
        if not messages or messages[-1]["role"] == "assistant":
            raise UserError(
                "inference_prompt: the messages do not end with one to answer", fix="end with a user message"
            )
    if isinstance(wording, _Chat):
        try:
            return wording.opening_ids(wording.opening(messages))
        except _Refused as refused:
            raise UserError(f"inference_prompt: the chat template refuses the messages: {refused}") from refused
    turns = tuple(Message(message["role"], message["content"]) for message in messages)
    try:
        return wording.opening_ids(wording.prompt(Conversation((*turns, Message("assistant", "")))))
    except _Refused as refused:
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
    return _fingerprint(tokenizer, _wording(tokenizer, template, separator).source if worded else "")


def require_same_words(tokenizer: PreTrainedTokenizerBase, trained_with: str, where: str) -> None:
    """Refuse a tokenizer or chat template other than the one an adapter was trained with."""
    found = {fingerprint(tokenizer, worded=worded) for worded in (True, False)}
    if trained_with not in found:
        raise UserError(
            f"{where}: its tokenizer or chat template is not the one this adapter was trained with "
            f"(trained with {trained_with[:12]}, found {min(found)[:12]}), so prompts would be worded otherwise",
            fix="put the tokenizer files of the base back as they were, or train again",
        )


def _fingerprint(tokenizer: PreTrainedTokenizerBase, source: str) -> str:
    digest = hashlib.sha256(source.encode() + b"\0")
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{number}\t{token}\n".encode("utf-8", "surrogatepass"))
    names = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    digest.update(repr([getattr(tokenizer, f"{name}_token_id", None) for name in names]).encode())
    return digest.hexdigest()


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = nearest(str(value), choices, 1)
        fix = f"{name}={near[0]!r}" if near else "pass one of these"
        raise UserError(f"unknown {name} {value!r}; known: {listing(choices)}", fix=fix)


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{type(tokenizer).__name__} cannot tell which characters a token stands for; masks need a fast tokenizer",
            fix="load it with AutoTokenizer, or convert it to tokenizer.json",
        )


@dataclass(frozen=True)
class _Settings:
    max_length: int | None
    truncation: str
    train_on: str


class _Refused(Exception):
    """An example that a template cannot render, or cannot be aligned in."""


@dataclass(frozen=True)
class _Layout:
    """A sequence as one string, with the spans of characters to train."""

    text: str
    spans: tuple[tuple[int, int], ...]
    open_turn: bool = False
    """Some trained turn has no end-of-turn token."""
    rewritten: bool = False
    """The template changed the words of a trained turn."""
    touching: bool = False
    """Prompt and completion meet without white space."""


def _common(first: str, second: str) -> int:
    """The length of the longest common start."""
    shorter = min(len(first), len(second))
    return next((place for place in range(shorter) if first[place] != second[place]), shorter)


def _as_dict(message: Message | Mapping[str, str]) -> dict[str, str]:
    if isinstance(message, Message):
        return {"role": message.role, "content": message.content}
    if not {"role", "content"} <= set(message):
        raise UserError(
            f"a message has {listing(message) or 'nothing'}, expected role and content", fix="add what misses"
        )
    return {"role": message["role"], "content": message["content"]}


def _as_messages(example: Example) -> list[dict[str, str]]:
    """The messages of a conversation or of a prompt and its completion."""
    if isinstance(example, PromptCompletion):
        system = [{"role": "system", "content": example.system}] if example.system.strip() else []
        user = {"role": "user", "content": example.prompt}
        return [*system, user, {"role": "assistant", "content": example.completion}]
    return [_as_dict(message) for message in example.messages] if isinstance(example, Conversation) else []


def _learned_turns(example: Example) -> list[int]:
    """Which messages are to be learned: assistant turns that are trained and not blank."""
    if isinstance(example, PromptCompletion):
        return [len(_as_messages(example)) - 1] if example.completion.strip() else []
    if isinstance(example, Conversation):
        return [
            index
            for index, message in enumerate(example.messages)
            if message.role == "assistant" and message.trained and message.content.strip()
        ]
    return []


def _wording(tokenizer: PreTrainedTokenizerBase, template: str, separator: str) -> _Chat | _Plain:
    _check_choice("template", template, ("auto", "chat", "plain"))
    has = bool(getattr(tokenizer, "chat_template", None))
    if template == "chat" and not has:
        raise UserError(
            "template='chat', but the tokenizer has no chat template",
            fix="template='plain', or set tokenizer.chat_template",
        )
    if not has or template == "plain":
        return _Plain(tokenizer, separator)
    if separator:
        raise UserError(
            f"separator={separator!r} has no place in a chat template", fix="leave it out, or template='plain'"
        )
    return _Chat(tokenizer)


class _Chat:
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
        except _Refused as refused:
            raise UserError(
                f"the chat template fails on one question and its answer: {refused}", fix="mend the template"
            ) from refused
        shared = _common(prompt, whole)
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
            raise _Refused(str(error).strip().split("\n")[0] or type(error).__name__) from error
        return rendered

    def opening(self, messages: list[dict[str, str]]) -> str:
        """What stands before the assistant's next words: the generation prompt, as far as training text holds it."""
        if messages:
            prompt = self.render(messages, generate=True)
            return prompt.removesuffix(self.surplus) if self.surplus else prompt
        probes = [self.render([{"role": "assistant", "content": word}]) for word in ("Alpha", "Beta")]
        return probes[0][: _common(*probes)]

    def opening_ids(self, opening: str) -> list[int]:
        ids: list[int] = self.tokenizer(opening, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def layout(self, example: Example, train_on: str) -> _Layout:
        messages = _as_messages(example)
        turns = _learned_turns(example)
        if train_on == "all":
            whole = self.render(messages)
            return _Layout(whole, ((0, len(whole)),))
        messages = messages[: turns[-1] + 1]
        whole = self.render(messages)
        found = [self._span(messages, turn, whole) for turn in turns]
        return _Layout(
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
            shared = _common(opening, through)
            closed = self.render(messages[:turn]) if turn else ""
            if shared < len(closed) or not opening.startswith(closed):
                raise _Refused(f"turn {turn + 1}: the template writes earlier turns differently once it follows")
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
                        ending = ending[: _common(ending, rest[after:])]
                        visible = bool(ending.strip())
                        return start, start + after + len(ending.rstrip() if visible else ending), visible, False
        raise _Refused(f"turn {turn + 1}: the template writes it differently once later turns follow")


class _Plain:
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
                raise _Refused("a conversation of several answers, or with none at its end, needs a chat template")
            return "\n\n".join(message.content for message in asked) + "\n" * bool(asked)
        return example.text if isinstance(example, Text) else ""

    def opening_ids(self, opening: str) -> list[int]:
        return _without_end(self.tokenizer(opening, verbose=False)["input_ids"], self.tokenizer, True)

    def layout(self, example: Example, train_on: str) -> _Layout:
        if isinstance(example, Text):
            return _Layout(example.text, ((0, len(example.text)),))
        if isinstance(example, Conversation):
            last = _learned_turns(example)[-1]
            example = Conversation(example.messages[: last + 1])
        prompt = self.prompt(example)
        completion = (
            example.completion if isinstance(example, PromptCompletion) else _as_messages(example)[-1]["content"]
        )
        text = prompt + completion
        touching = not (prompt[-1:].isspace() or completion[:1].isspace())
        return _Layout(text, ((0 if train_on == "all" else len(prompt), len(text)),), touching=touching)


@dataclass
class _Counts:
    """Row numbers by what happened to them."""

    over_long: list[int] = field(default_factory=list)
    truncated: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    split: list[int] = field(default_factory=list)
    masked: list[int] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)
    prompt_differs: list[int] = field(default_factory=list)
    special_text: list[int] = field(default_factory=list)
    open_turn: list[int] = field(default_factory=list)
    rewritten: list[int] = field(default_factory=list)
    touching: list[int] = field(default_factory=list)
    longest: int = 0
    longest_row: int = 0

    def measure(self, row: int, length: int, max_length: int | None) -> bool:
        """Note a row's length; true if it is over the limit."""
        if length > self.longest:
            self.longest, self.longest_row = length, row
        over = max_length is not None and length > max_length
        if over:
            self.over_long.append(row)
        return over


def _rows(examples: Sequence[Example]) -> Iterator[tuple[int, Example]]:
    """Each example with the number a person knows it by."""
    for position, example in enumerate(examples, start=1):
        yield example.row or position, example


def _listed(rows: Sequence[int]) -> str:
    return ("row " if len(rows) == 1 else "rows ") + listing(str(row) for row in rows)


def _own_texts(example: Example) -> list[str]:
    if isinstance(example, Text):
        return [example.text]
    if isinstance(example, Labelled):
        return [example.text, example.pair or ""]
    return [message["content"] for message in _as_messages(example)]


def _special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    words = {str(token) for token in tokenizer.all_special_tokens}
    words |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    longest_first = sorted((word for word in words if word.strip()), key=lambda word: (-len(word), word))
    return re.compile("|".join(re.escape(word) for word in longest_first)) if longest_first else None


def _encode_texts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, settings: _Settings, wording: _Chat | _Plain
) -> EncodedSet:
    counts = _Counts()
    pattern = _special_pattern(tokenizer)
    plain = isinstance(wording, _Plain)
    if plain and tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end-of-sequence token, so a model could not learn where to stop",
            fix="set tokenizer.eos_token",
        )
    refused: list[str] = []
    layouts: list[tuple[int, _Layout]] = []
    for row, example in _rows(examples):
        blank = not example.text.strip() if isinstance(example, Text) else not _learned_turns(example)
        if blank:
            counts.empty.append(row)
            continue
        try:
            layout = wording.layout(example, settings.train_on)
        except _Refused as reason:
            refused.append(f"row {row}: {reason}")
            continue
        layouts.append((row, layout))
        for kind in ("open_turn", "rewritten", "touching"):
            if getattr(layout, kind):
                getattr(counts, kind).append(row)
        if pattern is not None and any(pattern.search(text) for text in _own_texts(example)):
            counts.special_text.append(row)
    if refused:
        shown = "\n  ".join(refused[:10]) + (f"\n  (+{len(refused) - 10} more)" if len(refused) > 10 else "")
        what = (
            "these rows cannot be written without a chat template" if plain else "the chat template refuses these rows"
        )
        fix = "mend or remove the rows, or keep only the last answer of each (weight 0 on the earlier ones)"
        if plain:
            fix = "set tokenizer.chat_template, or keep one answer per row"
        raise UserError(f"{len(refused)} of {len(examples)} rows: {what}:\n  {shown}", fix=fix)
    made: list[Encoded] = []
    for first in range(0, len(layouts), CHUNK):
        for row, ids, trained in _tokenised(layouts[first : first + CHUNK], tokenizer, plain, counts):
            if counts.measure(row, len(ids), settings.max_length):
                made.extend(_fitted(row, ids, trained, tokenizer.bos_token_id, settings, counts))
            else:
                made.append(Encoded(ids, trained, row=row))
    _refuse_over_long(counts, len(examples), settings, isinstance(examples[0], Text))
    trained_tokens = sum(item.targets for item in made)
    return _finished(examples, made, None, counts, settings, wording, tokenizer, trained_tokens)


def _tokenised(
    layouts: Sequence[tuple[int, _Layout]], tokenizer: PreTrainedTokenizerBase, plain: bool, counts: _Counts
) -> Iterator[tuple[int, list[int], list[bool]]]:
    """Row, ids and mask of each layout, tokenised in one call."""
    batch = tokenizer(
        [layout.text for _, layout in layouts],
        add_special_tokens=plain,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    openings = sorted({_last_prompt(layout) for _, layout in layouts} - {""})
    prompts: dict[str, list[int]] = {}
    if openings:
        alone = tokenizer(openings, add_special_tokens=plain, return_attention_mask=False, verbose=False)["input_ids"]
        prompts = {opening: _without_end(ids, tokenizer, plain) for opening, ids in zip(openings, alone, strict=True)}
    for (row, layout), ids, offsets in zip(layouts, batch["input_ids"], batch["offset_mapping"], strict=True):
        trained = _mask(offsets, layout.spans)
        alone = prompts.get(_last_prompt(layout))
        if alone is not None and list(ids[: len(alone)]) != alone:
            counts.prompt_differs.append(row)
        if plain and ids[-1:] == [tokenizer.eos_token_id]:
            trained[-1] = True
        elif plain:
            ids, trained = [*ids, tokenizer.eos_token_id], [*trained, True]
        yield row, list(ids), trained


def _without_end(ids: list[int], tokenizer: PreTrainedTokenizerBase, plain: bool) -> list[int]:
    """The ids but for an end-of-sequence token that the tokenizer put behind plain text."""
    return ids[:-1] if plain and ids[-1:] == [tokenizer.eos_token_id] else ids


def _mask(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens have a character in a span; both are in order.

    A token of white space alone may have shrunk to no width, at the end of where it stood; a token the tokenizer added
    has no width either, at 0.
    """
    trained = []
    current = 0
    for start, end in offsets:
        while current < len(spans) and spans[current][1] < end:
            if spans[current][1] > start:
                break
            current += 1
        if current == len(spans):
            trained.append(False)
            continue
        first, last = spans[current]
        trained.append(start < last and end > first if end > start else first < end <= last)
    return trained


def _last_prompt(layout: _Layout) -> str:
    """What generation would start from."""
    return layout.text[: layout.spans[-1][0]]


def _fitted(
    row: int, ids: list[int], trained: list[bool], bos: int | None, settings: _Settings, counts: _Counts
) -> list[Encoded]:
    """What is left of an over-long row."""
    limit = settings.max_length or len(ids)
    head = 1 if ids[0] == bos else 0
    if settings.truncation == "error":
        return []
    if settings.truncation == "drop":
        counts.dropped.append(row)
        return []
    if settings.truncation == "split":
        counts.split.append(row)
        # Without a first token of its own, a piece starts with the last token of the piece before, as context.
        step, start = limit - 1, 1
        return [
            Encoded(
                (ids[:1] if head else ids[at - 1 : at]) + ids[at : at + step],
                [False, *trained[at : at + step]] if head or at > 1 else trained[:limit],
                row=row,
            )
            for at in range(start, len(ids), step)
        ]
    if settings.truncation == "right":
        cut = Encoded(ids[:limit], trained[:limit], row=row)
    else:
        kept = len(ids) - (limit - head)
        cut = Encoded(ids[:head] + ids[kept:], trained[:head] + trained[kept:], row=row)
    if not cut.targets:
        counts.masked.append(row)
        return []
    counts.truncated.append(row)
    return [cut]


def _refuse_over_long(counts: _Counts, rows: int, settings: _Settings, text: bool) -> None:
    if counts.over_long and settings.truncation == "error":
        several = len(counts.over_long) > 1
        raise UserError(
            f"{len(counts.over_long)} of {rows} rows {'are' if several else 'is'} longer than "
            f"max_length={settings.max_length} tokens: {_listed(counts.over_long)}; the longest is row "
            f"{counts.longest_row} with {counts.longest} tokens",
            fix=f"max_length={counts.longest}, or truncation='drop', 'right' or 'left'"
            + (" or 'split'" if text else ""),
        )


def _encode_sources(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    settings: _Settings,
    wording: _Plain,
    start: int,
) -> EncodedSet:
    """Prompts as an encoder's inputs, completions as what the decoder writes."""
    if isinstance(examples[0], Text):
        raise UserError("plain text has no prompt for an encoder to read", fix="give rows of prompt and completion")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token", fix="set tokenizer.eos_token")
    counts, made, refused = _Counts(), list[Encoded](), list[str]()
    limit = settings.max_length
    for row, example in _rows(examples):
        if not _learned_turns(example):
            counts.empty.append(row)
            continue
        try:
            prompt = wording.prompt(example)
        except _Refused as reason:
            refused.append(f"row {row}: {reason}")
            continue
        source = source_ids(prompt, tokenizer)
        answer = _as_messages(example)[-1]["content"]
        target = _without_end(tokenizer(text_target=answer, verbose=False)["input_ids"], tokenizer, True)
        target = [*target, tokenizer.eos_token_id]
        if counts.measure(row, max(len(source), len(target)), limit):
            if settings.truncation == "error":
                continue
            if settings.truncation == "drop":
                counts.dropped.append(row)
                continue
            counts.truncated.append(row)
            ending = source[-1:] if source[-1:] == [tokenizer.eos_token_id] else []
            room = (limit or 0) - len(ending)
            words = source[: len(source) - len(ending)]
            source = (words[:room] if settings.truncation == "right" else words[-room:]) + ending
            target = target[:limit]
        made.append(Encoded([start, *target], [False] + [True] * len(target), row=row, source=source))
    if refused:
        raise UserError(
            "these rows have no single answer:\n  " + "\n  ".join(refused[:10]), fix="keep one answer per row"
        )
    _refuse_over_long(counts, len(examples), settings, False)
    return _finished(examples, made, None, counts, settings, wording, tokenizer, sum(item.targets for item in made))


def _encode_labelled(
    examples: Sequence[Labelled], tokenizer: PreTrainedTokenizerBase, settings: _Settings, labels: Labels | None
) -> EncodedSet:
    labels = labels if labels is not None else labels_of(examples)
    numbers = _numbers(examples, labels)
    if settings.truncation == "left" and any(example.pair is not None for example in examples):
        raise UserError("truncation='left' is not for pairs of texts", fix="truncation='right' shortens the longer one")
    counts = _Counts()
    pattern = _special_pattern(tokenizer)
    made: list[Encoded] = []
    for first in range(0, len(examples), CHUNK):
        chunk = examples[first : first + CHUNK]
        batch = _paired(chunk, tokenizer, None, "right")
        for place, example in enumerate(chunk):
            row = example.row or first + place + 1
            ids, types = batch[place]
            if pattern is not None and any(pattern.search(text) for text in _own_texts(example)):
                counts.special_text.append(row)
            if counts.measure(row, len(ids), settings.max_length):
                if settings.truncation == "error":
                    continue
                if settings.truncation == "drop":
                    counts.dropped.append(row)
                    continue
                ids, types = _paired([example], tokenizer, settings.max_length, settings.truncation)[0]
                counts.truncated.append(row)
            made.append(Encoded(ids, [False] * len(ids), numbers[first + place], types, row))
    _refuse_over_long(counts, len(examples), settings, False)
    return _finished(examples, made, labels, counts, settings, None, tokenizer, len(made))


def _paired(
    examples: Sequence[Labelled], tokenizer: PreTrainedTokenizerBase, max_length: int | None, side: str
) -> list[tuple[list[int], list[int] | None]]:
    """Ids and segment ids of texts or pairs with the tokenizer's special tokens."""
    if len({example.pair is None for example in examples}) > 1:
        return [made for example in examples for made in _paired([example], tokenizer, max_length, side)]
    pairs = [example.pair for example in examples] if examples[0].pair is not None else None
    before = tokenizer.truncation_side
    tokenizer.truncation_side = side
    try:
        batch = tokenizer(
            [example.text for example in examples],
            pairs,
            truncation=max_length is not None,
            max_length=max_length,
            return_attention_mask=False,
            verbose=False,
        )
    finally:
        tokenizer.truncation_side = before
    types = batch.get("token_type_ids") or [None] * len(examples)
    return list(zip(batch["input_ids"], types, strict=True))


def labels_of(examples: Sequence[Labelled]) -> Labels:
    """The classes of a training set, in the order of their numbers: whole numbers, then strings; or regression."""
    found = {example.label for example in examples}
    floats = sum(isinstance(label, float) for label in found)
    if floats == len(found):
        return "regression"
    if floats:
        raise UserError(
            "encode: some labels are numbers with a point and some are not", fix="write them all the same way"
        )

    def order(label: Label) -> tuple[bool, int, str]:
        whole = re.fullmatch(r"[+-]?\d+", str(label))
        return not whole, int(str(label)) if whole else 0, str(label)

    return tuple(sorted(found, key=order))


def _numbers(examples: Sequence[Labelled], labels: Labels) -> list[int | float]:
    """Each example's class number, or its label itself; classes are compared as written, so 1 is `"1"`."""
    problems = []
    numbers: list[int | float] = []
    places = {str(label): place for place, label in enumerate(labels)} if labels != "regression" else {}
    for row, example in _rows(examples):
        label = example.label if isinstance(example, Labelled) else ""
        if labels == "regression":
            if isinstance(label, str | bool):
                problems.append(f"row {row}: {label!r} is not a number")
            else:
                numbers.append(float(label))
        elif str(label) in places:
            numbers.append(places[str(label)])
        else:
            near = nearest(str(label), places, 1)
            problems.append(f"row {row}: {label!r}" + (f" (nearest: {near[0]})" if near else ""))
    if problems:
        known = "numbers" if labels == "regression" else listing(str(label) for label in labels)
        shown = "\n  ".join(problems[:10]) + (f"\n  (+{len(problems) - 10} more)" if len(problems) > 10 else "")
        raise UserError(
            f"{len(problems)} of {len(examples)} rows have a label that training did not have ({known}):\n  {shown}",
            fix="mend the labels, or fix the classes with labels=",
        )
    return numbers


def _finished(
    examples: Sequence[Example],
    made: list[Encoded],
    labels: Labels | None,
    counts: _Counts,
    settings: _Settings,
    wording: _Chat | _Plain | None,
    tokenizer: PreTrainedTokenizerBase,
    trained_tokens: int,
) -> EncodedSet:
    """Refuse a set in which nothing is trained, and write the report."""
    if not trained_tokens:
        reasons = [
            f"{len(rows)} {what}"
            for rows, what in (
                (counts.empty, "have nothing to learn (blank completions, or no trained assistant turn)"),
                (counts.dropped, f"are longer than max_length={settings.max_length} and were dropped"),
                (counts.masked, f"lost every trained token to truncation={settings.truncation!r}"),
            )
            if rows
        ]
        raise UserError(
            f"not one token of {len(examples)} rows would be trained: {'; '.join(reasons) or 'all are one token long'}",
            fix="raise max_length, or give rows with completions" if counts.over_long else "give rows with completions",
        )
    distinct = {(tuple(item.source or ()), tuple(item.ids), tuple(item.trained), item.label) for item in made}
    source = "" if wording is None else wording.source
    report = Report(
        rows=len(examples),
        sequences=len(made),
        over_long=len(counts.over_long),
        truncated=len(counts.truncated),
        dropped=len(counts.dropped),
        split=len(counts.split),
        masked=len(counts.masked),
        empty=len(counts.empty),
        duplicates=len(made) - len(distinct),
        prompt_differs=len(counts.prompt_differs),
        special_text=len(counts.special_text),
        trained_tokens=trained_tokens,
        total_tokens=sum(len(item.ids) + len(item.source or ()) for item in made),
        longest=counts.longest,
        longest_row=counts.longest_row,
        max_length=settings.max_length,
        truncation=settings.truncation,
        train_on=settings.train_on,
        template="none" if wording is None else wording.name,
        separator="" if wording is None else wording.separator,
        fingerprint=_fingerprint(tokenizer, source),
        notes=tuple(_notes(counts, settings, source)),
    )
    return EncodedSet(tuple(made), report, labels)


def _notes(counts: _Counts, settings: _Settings, source: str) -> Iterator[str]:
    limit = f"max_length={settings.max_length}"
    texts = (
        (counts.truncated, f"over {limit}, cut (truncation={settings.truncation!r})"),
        (counts.dropped, f"over {limit}, left out"),
        (counts.split, f"over {limit}, split"),
        (counts.masked, "with no trained token left after the cut, left out"),
        (counts.empty, "with nothing to learn, left out"),
        (counts.prompt_differs, "whose prompt alone, as in generation, splits into other tokens"),
        (counts.special_text, "whose own text spells a special token, which is read as that token"),
        (counts.open_turn, "with an assistant turn that the template ends with no token to stop at"),
        (counts.rewritten, "with an assistant turn that the template rewords (what it writes is trained)"),
        (counts.touching, "whose prompt and completion meet without white space (separator= parts them)"),
    )
    for rows, what in texts:
        if rows:
            yield f"{len(rows)} {'row' if len(rows) == 1 else 'rows'} {what}: {listing(str(row) for row in rows)}"
    if "strftime_now" in source:
        yield "the chat template writes today's date, so the ids change from day to day"
