"""Answers in OpenAI's shapes: whole ones, pieces of a stream, usage and log-probabilities."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trimtab.serve.sampling import Choice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Reply:
    """One answer to one request; `chat` says which of the two forms it takes."""

    chat: bool
    model: str
    prompt_tokens: int
    tokenizer: PreTrainedTokenizerBase
    logprobs: int | None
    id: str = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))
    offset: int = 0
    """Where in the text the next token begins."""

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12)

    def frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """What every document of this answer has."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def whole(self, text: str, tokens: Sequence[Choice], reason: str, written: int) -> dict[str, Any]:
        """The finished answer."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": self.logs(tokens)}
        choice |= {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        kind = "chat.completion" if self.chat else "text_completion"
        return self.frame(kind, [choice]) | {"usage": self.usage(written)}

    def opening(self) -> dict[str, Any] | None:
        """The first piece of a chat stream, which names the role."""
        return self.chunk({"role": "assistant", "content": ""}, [], None) if self.chat else None

    def piece(self, text: str, tokens: Sequence[Choice]) -> dict[str, Any]:
        """A piece of a stream."""
        return self.chunk({"content": text} if self.chat else text, tokens, None)

    def ending(self, reason: str) -> dict[str, Any]:
        """The last piece of a stream, which says why it ends."""
        return self.chunk({} if self.chat else "", [], reason)

    def counts(self, written: int) -> dict[str, Any]:
        """The usage at the end of a stream that asked for it."""
        return self.frame(self.stream_kind, []) | {"usage": self.usage(written)}

    @property
    def stream_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def chunk(self, content: Any, tokens: Sequence[Choice], reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "finish_reason": reason, "logprobs": self.logs(tokens) if tokens else None}
        return self.frame(self.stream_kind, [choice | {"delta" if self.chat else "text": content}])

    def usage(self, written: int) -> dict[str, int]:
        """How many tokens were read and written; the one that ends an answer is not counted."""
        total = self.prompt_tokens + written
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": written, "total_tokens": total}

    def logs(self, tokens: Sequence[Choice]) -> dict[str, Any] | None:
        """The log-probabilities of tokens, where they are asked for."""
        if self.logprobs is None:
            return None
        if self.chat:
            return {
                "content": [
                    self.named(one.token, one.logprob) | {"top_logprobs": [self.named(*other) for other in one.top]}
                    for one in tokens
                ],
                "refusal": None,
            }
        words = [self.word(one.token) for one in tokens]
        starts = [self.offset + sum(map(len, words[:at])) for at in range(len(words))]
        self.offset += sum(map(len, words))
        top = [{self.word(token): value for token, value in one.top} for one in tokens]
        logs = [one.logprob for one in tokens]
        return {"tokens": words, "token_logprobs": logs, "top_logprobs": top, "text_offset": starts}

    def word(self, token: int) -> str:
        """A token as text."""
        return str(self.tokenizer.decode([token]))

    def named(self, token: int, logprob: float | None) -> dict[str, Any]:
        word = self.word(token)
        return {"token": word, "logprob": logprob, "bytes": list(word.encode())}
