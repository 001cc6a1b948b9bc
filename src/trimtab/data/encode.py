"""From examples to token ids, and the mask that says which of them are learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from trimtab.core.errors import UserError, listing
from trimtab.data.counting import Counts, Settings, finished, numbered, refuse_over_long
from trimtab.data.encoded import Encoded, EncodedSet, Labels
from trimtab.data.examples import Example, Labelled, Text
from trimtab.data.labelled import CHUNK, encode_labelled
from trimtab.data.wording import (
    Chat,
    Layout,
    Plain,
    Refused,
    Template,
    as_messages,
    check_choice,
    check_tokenizer,
    learned_turns,
    own_texts,
    source_ids,
    special_pattern,
    without_end,
    wording_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Truncation = Literal["error", "drop", "left", "right", "split"]
TrainOn = Literal["completions", "all"]


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
    check_choice("truncation", truncation, ("error", "drop", "left", "right", "split"))
    check_choice("train_on", train_on, ("completions", "all"))
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
    check_tokenizer(tokenizer)
    settings = Settings(max_length, truncation, train_on)
    if isinstance(examples[0], Labelled):
        return encode_labelled([e for e in examples if isinstance(e, Labelled)], tokenizer, settings, labels)
    if decoder_start is not None:
        return encode_sources(examples, tokenizer, settings, Plain(tokenizer, separator), decoder_start)
    wording = wording_of(tokenizer, "plain" if isinstance(examples[0], Text) else template, separator)
    return encode_texts(examples, tokenizer, settings, wording)


def encode_texts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, settings: Settings, wording: Chat | Plain
) -> EncodedSet:
    """Prompts with completions, chats and plain texts as one sequence each."""
    counts = Counts()
    pattern = special_pattern(tokenizer)
    plain = isinstance(wording, Plain)
    if plain and tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end-of-sequence token, so a model could not learn where to stop",
            fix="set tokenizer.eos_token",
        )
    refused: list[str] = []
    layouts: list[tuple[int, Layout]] = []
    for row, example in numbered(examples):
        blank = not example.text.strip() if isinstance(example, Text) else not learned_turns(example)
        if blank:
            counts.empty.append(row)
            continue
        try:
            layout = wording.layout(example, settings.train_on)
        except Refused as reason:
            refused.append(f"row {row}: {reason}")
            continue
        layouts.append((row, layout))
        for kind in ("open_turn", "rewritten", "touching"):
            if getattr(layout, kind):
                getattr(counts, kind).append(row)
        if pattern is not None and any(pattern.search(text) for text in own_texts(example)):
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
        for row, ids, trained in tokenised(layouts[first : first + CHUNK], tokenizer, plain, counts):
            if counts.measure(row, len(ids), settings.max_length):
                made.extend(fitted(row, ids, trained, tokenizer.bos_token_id, settings, counts))
            else:
                made.append(Encoded(ids, trained, row=row))
    refuse_over_long(counts, len(examples), settings, isinstance(examples[0], Text))
    trained_tokens = sum(item.targets for item in made)
    return finished(examples, made, None, counts, settings, wording, tokenizer, trained_tokens)


def tokenised(
    layouts: Sequence[tuple[int, Layout]], tokenizer: PreTrainedTokenizerBase, plain: bool, counts: Counts
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
    openings = sorted({last_prompt(layout) for _, layout in layouts} - {""})
    prompts: dict[str, list[int]] = {}
    if openings:
        alone = tokenizer(openings, add_special_tokens=plain, return_attention_mask=False, verbose=False)["input_ids"]
        prompts = {opening: without_end(ids, tokenizer, plain) for opening, ids in zip(openings, alone, strict=True)}
    for (row, layout), ids, offsets in zip(layouts, batch["input_ids"], batch["offset_mapping"], strict=True):
        trained = mask_of(offsets, layout.spans)
        alone = prompts.get(last_prompt(layout))
        if alone is not None and list(ids[: len(alone)]) != alone:
            counts.prompt_differs.append(row)
        if plain and ids[-1:] == [tokenizer.eos_token_id]:
            trained[-1] = True
        elif plain:
            ids, trained = [*ids, tokenizer.eos_token_id], [*trained, True]
        yield row, list(ids), trained


def mask_of(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
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


def last_prompt(layout: Layout) -> str:
    """What generation would start from."""
    return layout.text[: layout.spans[-1][0]]


def fitted(
    row: int, ids: list[int], trained: list[bool], bos: int | None, settings: Settings, counts: Counts
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


def encode_sources(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    wording: Plain,
    start: int,
) -> EncodedSet:
    """Prompts as an encoder's inputs, completions as what the decoder writes."""
    if isinstance(examples[0], Text):
        raise UserError("plain text has no prompt for an encoder to read", fix="give rows of prompt and completion")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token", fix="set tokenizer.eos_token")
    counts, made, refused = Counts(), list[Encoded](), list[str]()
    limit = settings.max_length
    for row, example in numbered(examples):
        if not learned_turns(example):
            counts.empty.append(row)
            continue
        try:
            prompt = wording.prompt(example)
        except Refused as reason:
            refused.append(f"row {row}: {reason}")
            continue
        source = source_ids(prompt, tokenizer)
        answer = as_messages(example)[-1]["content"]
        target = without_end(tokenizer(text_target=answer, verbose=False)["input_ids"], tokenizer, True)
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
    refuse_over_long(counts, len(examples), settings, False)
    return finished(examples, made, None, counts, settings, wording, tokenizer, sum(item.targets for item in made))
