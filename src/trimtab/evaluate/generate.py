"""Greedy answers to many prompts, and one answer piece by piece: two uses of one incremental loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError, listing
from trimtab.core.modes import evaluating
from trimtab.data.encode import encode
from trimtab.data.examples import PromptCompletion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HALF = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are no whole character yet."""


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
    *,
    until: Sequence[str] = (),
) -> list[str]:
    """The greedy continuation of each prompt (token ids), up to a stop token, a text of `until` or `max_new_tokens`.

    Special tokens are left out. Prompts of like length run together, padded on the left; the answers come back in the
    order given and, rounding apart, do not depend on `batch_size`. `progress(done, all)` is called after each batch. A
    row also ends where the model has no more positions. For an encoder-decoder, prompts are what its encoder reads.
    Errors: no prompt ids, a prompt that fills every position.
    """
    check(model, prompts, max_new_tokens)
    stops, order = stop_ids(model, tokenizer), sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [""] * len(prompts)
    with evaluating(model), torch.no_grad():
        for start in range(0, len(order), max(1, batch_size)):
            group = order[start : start + max(1, batch_size)]
            grown: list[list[int]] = [[] for _ in group]
            running, texts = [True] * len(group), [Growing(tokenizer) for _ in group]
            written = [""] * len(group)
            for ids in steps(model, [prompts[index] for index in group], max_new_tokens, greedy):
                for row, token in enumerate(ids):
                    room = len(prompts[group[row]]) + len(grown[row]) < room_of(model)
                    running[row] = running[row] and room and token not in stops
                    if running[row]:
                        grown[row].append(token)
                        if until:
                            written[row] += texts[row].add(token)
                            running[row] = not any(stop in written[row] for stop in until)
                if not any(running):
                    break
            for row, index in enumerate(group):
                whole = tokenizer.decode(grown[row], skip_special_tokens=True)
                answers[index] = whole[: min((at for stop in until if (at := whole.find(stop)) >= 0), default=None)]
            if progress is not None:
                progress(start + len(group), len(order))
    return answers


def stream(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int | None = None,
) -> Iterator[str]:
    """The continuation of one prompt as pieces of text, which never end within a character.

    `temperature` 0 is greedy; otherwise tokens are drawn from softmax(logits / temperature), the same ones for the same
    `seed`. Errors as of `generate`.
    """
    if temperature < 0:
        raise UserError(
            f"temperature={temperature:g} is negative", fix="0 for the likeliest answer, 0.7 for a varied one"
        )
    check(model, [prompt_ids], max_new_tokens)
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)

    def choose(logits: Tensor) -> Tensor:
        weights = torch.softmax(logits.float().cpu() / temperature, -1)
        return torch.multinomial(weights, 1, generator=generator)[:, 0]

    return pieces(tokenizer, tokens(model, tokenizer, prompt_ids, max_new_tokens, choose if temperature else greedy))


def tokens(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    choose: Callable[[Tensor], Tensor],
) -> Iterator[int]:
    """The token ids of one answer, up to its stop token, which is not among them."""
    stops, limit = stop_ids(model, tokenizer), min(max_new_tokens, room_of(model) - len(prompt_ids))
    source = steps(model, [prompt_ids], limit, choose)
    with evaluating(model):
        while True:
            with torch.no_grad():  # a generator shares the mode of whoever runs it: set it for each step alone
                ids = next(source, None)
            if ids is None or ids[0] in stops:
                return
            yield ids[0]


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Iterator[int]) -> Iterator[str]:
    """Text for token ids as they come: each piece is what the newest tokens add to the ones before them."""
    growing = Growing(tokenizer)
    for token in ids:
        if piece := growing.add(token):
            yield piece
    if rest := growing.rest():
        yield rest


class Growing:
    """The text of tokens that come one by one. A piece never ends within a character.

    Only the tokens of the last two pieces are decoded again, so that the cost of a piece does not grow.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.seen: list[int] = []
        self.context = self.shown = 0
        self.before = ""

    def add(self, token: int) -> str:
        """What a token adds to the text; empty while it is part of a character."""
        self.seen.append(token)
        now = self.tokenizer.decode(self.seen[self.context :], skip_special_tokens=True)
        if now.endswith(HALF) or len(now) <= len(self.before):
            return ""
        piece = now[len(self.before) :]
        self.context, self.shown = self.shown, len(self.seen)
        self.before = self.tokenizer.decode(self.seen[self.context : self.shown], skip_special_tokens=True)
        return piece

    def rest(self) -> str:
        """What was held back, once no more tokens come."""
        now = self.tokenizer.decode(self.seen[self.context :], skip_special_tokens=True)
        return now[len(self.before) :]


def steps(
    model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, choose: Callable[[Tensor], Tensor]
) -> Iterator[list[int]]:
    """The next token of every row, over and over, with the model's own cache of keys and values where it has one."""
    if encodes(model):
        yield from decoded(model, prompts, max_new_tokens, choose)
        return
    names = set(inspect.signature(model.forward).parameters)
    device = next(parameter.device for parameter in model.parameters())
    longest, last = max(map(len, prompts)), room_of(model) - 1
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask[row, longest - len(prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    ids = ids.masked_fill(mask == 0, int(ids[0, -1]))  # padding is hidden; its id only has to be in the vocabulary
    new, cache = ids, None
    for _ in range(max_new_tokens):
        call: dict[str, Any] = {"input_ids": new, "attention_mask": mask, "use_cache": True, "past_key_values": cache}
        positions = (mask.cumsum(1) - 1).clamp(0, last)
        call |= {"position_ids": positions[:, -new.shape[1] :], "logits_to_keep": 1}
        output = model(**{name: value for name, value in call.items() if name in names})
        chosen = choose(output.logits[:, -1]).to(device)
        yield chosen.tolist()
        cache = getattr(output, "past_key_values", None)
        ids = torch.cat([ids, chosen[:, None]], 1)
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], 1)
        new = ids if cache is None else chosen[:, None]


def encodes(model: nn.Module) -> bool:
    """Whether an encoder reads the prompt, and a decoder of its own writes the answer."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def decoded(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, choose: Callable[[Tensor], Tensor]
) -> Iterator[list[int]]:
    """The next token of every row of an encoder-decoder; its encoder runs once."""
    device = next(parameter.device for parameter in model.parameters())
    longest = max(map(len, prompts))
    ids = torch.tensor([[*prompt, *[prompt[-1]] * (longest - len(prompt))] for prompt in prompts], device=device)
    mask = torch.tensor([[at < len(prompt) for at in range(longest)] for prompt in prompts], device=device).long()
    new = torch.full((len(prompts), 1), model.config.decoder_start_token_id, dtype=torch.long, device=device)
    read, cache = None, None
    for _ in range(max_new_tokens):
        given = {"input_ids": ids} if read is None else {"encoder_outputs": read}
        output = model(**given, attention_mask=mask, decoder_input_ids=new, past_key_values=cache, use_cache=True)
        chosen = choose(output.logits[:, -1]).to(device)
        yield chosen.tolist()
        if read is None:
            from transformers.modeling_outputs import BaseModelOutput

            read = BaseModelOutput(last_hidden_state=output.encoder_last_hidden_state)
        cache = output.past_key_values
        new = chosen[:, None]


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token of each row: (rows, vocabulary) -> (rows,)."""
    return logits.argmax(-1)


def stop_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end an answer: those of the model's settings, the tokenizer's, and what training rows end with.

    The last matters where a chat template closes a turn with another token than the tokenizer's end of sequence.
    """
    found: set[int] = set()
    for settings in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        stop = getattr(settings, "eos_token_id", None)
        found |= set(stop) if isinstance(stop, list | tuple) else {stop} if isinstance(stop, int) else set()
    special = {*tokenizer.all_special_ids}
    special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    try:
        answered = encode(PromptCompletion("Question", "Answer"), tokenizer, max_length=None)
    except UserError:
        return frozenset(found)
    if encodes(model):
        return frozenset(found)
    ending = [token for token, trained in zip(answered.ids, answered.trained, strict=True) if trained][-1:]
    return frozenset(found | {token for token in ending if token in special})


def room_of(model: nn.Module, names: Sequence[str] | None = None) -> int:
    """How many tokens, prompt and answer together, the model has positions for; virtual tokens take theirs.

    Of all attached adapters (None), or of those in `names`.
    """
    config = getattr(model, "config", None)
    text: Any = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return 1 << 30
    return positions - virtual_of(model, names)


def virtual_of(model: nn.Module, names: Sequence[str] | None = None) -> int:
    """How many positions the virtual tokens of all attached adapters (None), or of those in `names`, take."""
    state = model.__dict__.get("_trimtab")
    if state is None:
        return 0
    parts = [part for name in (state.adapters if names is None else names) for part in state.adapters[name].parts]
    return sum(getattr(part.method, "virtual_tokens", 0) for part in parts)


def check(model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Refuse what cannot be generated, with every prompt at fault."""
    room = room_of(model)
    if max_new_tokens < 1:
        raise UserError(f"generate: max_new_tokens={max_new_tokens} leaves nothing to write", fix="1 or more")
    problems = [f"prompt {number} has no tokens" for number, ids in enumerate(prompts, 1) if not len(ids)]
    problems += [f"prompt {number} has {len(ids)} tokens" for number, ids in enumerate(prompts, 1) if len(ids) >= room]
    if problems:
        raise UserError(f"generate: the model takes {room} tokens at most: {listing(problems, 5)}", fix="shorten them")
