"""What a request may say: one table of fields, from which requests are checked and the OpenAPI description is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "developer", "user", "assistant")


class BadRequest(Exception):
    """A request that cannot be answered, in the shape of OpenAI's errors."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        self.message, self.param, self.status, self.code = message, param, status, code
        super().__init__(message)

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "server_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Number:
    """A number between two bounds; `whole` for integers."""

    low: float
    high: float
    about: str
    default: float | None = None
    whole: bool = False

    def read(self, value: Any, param: str) -> Any:
        kind = "a whole number" if self.whole else "a number"
        good = isinstance(value, int if self.whole else (int, float)) and not isinstance(value, bool)
        if not good or not self.low <= value <= self.high:  # NaN is in no range
            raise BadRequest(f"{param} is {kind} from {self.low:g} to {self.high:g}", param=param)
        return value

    def schema(self) -> dict[str, Any]:
        found = {"type": "integer" if self.whole else "number", "minimum": self.low, "maximum": self.high}
        return found | {"description": self.about} | ({} if self.default is None else {"default": self.default})


@dataclass(frozen=True)
class Only:
    """A setting of OpenAI's that has one value here: anything else is refused, not ignored."""

    values: tuple[Any, ...]
    about: str
    default: Any = None

    def read(self, value: Any, param: str) -> Any:
        if not any(value == one and type(value) is type(one) for one in self.values):
            told = " or ".join(map(repr, self.values))
            raise BadRequest(f"{param} can only be {told} here: {self.about}", param=param, code="unsupported_value")
        return value

    def schema(self) -> dict[str, Any]:
        return {"enum": list(self.values), "description": self.about}


@dataclass(frozen=True)
class Flag:
    """True or false."""

    about: str
    default: bool = False

    def read(self, value: Any, param: str) -> bool:
        if not isinstance(value, bool):
            raise BadRequest(f"{param} is true or false", param=param)
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "boolean", "default": self.default, "description": self.about}


@dataclass(frozen=True)
class Words:
    """A text."""

    about: str
    default: str | None = None

    def read(self, value: Any, param: str) -> str:
        if not isinstance(value, str) or not is_text(value):
            raise BadRequest(f"{param} is a text", param=param)
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "description": self.about}


@dataclass(frozen=True)
class Stops:
    """One to four strings that end the answer and are not part of it."""

    default: tuple[str, ...] = ()

    def read(self, value: Any, param: str) -> tuple[str, ...]:
        given = [value] if isinstance(value, str) else value
        good = isinstance(given, list) and len(given) <= 4 and all(isinstance(one, str) and one for one in given)
        if not good or any(len(one) > 200 or not is_text(one) for one in given):
            raise BadRequest(f"{param} is a text or up to four, of 1 to 200 characters each", param=param)
        return tuple(given)

    def schema(self) -> dict[str, Any]:
        one = {"type": "string", "minLength": 1, "maxLength": 200}
        return {"anyOf": [one, {"type": "array", "items": one, "maxItems": 4}], "description": self.__doc__}


@dataclass(frozen=True)
class Messages:
    """The talk so far, which ends with what is to be answered."""

    default: None = None

    def read(self, value: Any, param: str) -> list[dict[str, str]]:
        if not isinstance(value, list) or not value:
            raise BadRequest("messages is a list of at least one message", param=param)
        return [self.one(item, f"{param}[{at}]") for at, item in enumerate(value)]

    def one(self, item: Any, param: str) -> dict[str, str]:
        if not isinstance(item, Mapping) or item.get("role") not in ROLES:
            raise BadRequest(f"{param} has a role ({', '.join(ROLES)}) and a content", param=param)
        content = item.get("content")
        if isinstance(content, list):  # parts, all of them text
            parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
            typed = all(isinstance(part, Mapping) and part.get("type") == "text" for part in content)
            content = "".join(parts) if typed and all(isinstance(part, str) for part in parts) else None  # type: ignore[arg-type]
        if not isinstance(content, str) or not is_text(content):
            raise BadRequest(f"{param}.content is a text", param=param)
        return {"role": "system" if item["role"] == "developer" else item["role"], "content": content}

    def schema(self) -> dict[str, Any]:
        part = {"type": "object", "required": ["type", "text"], "properties": {"type": {"enum": ["text"]}}}
        part["properties"] |= {"text": {"type": "string"}}  # type: ignore[operator]
        content = {"anyOf": [{"type": "string"}, {"type": "array", "items": part}]}
        fields = {"role": {"type": "string", "enum": list(ROLES)}, "content": content}
        one = {"type": "object", "required": ["role", "content"], "properties": fields}
        return {"type": "array", "minItems": 1, "items": one, "description": self.__doc__}


@dataclass(frozen=True)
class Prompt:
    """A text to go on with, or its token ids."""

    default: None = None

    def read(self, value: Any, param: str) -> str | list[int]:
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
            value = value[0]
        if isinstance(value, str) and is_text(value):
            return value
        if isinstance(value, list) and value and all(type(one) is int and 0 <= one < 1 << 31 for one in value):
            return value
        raise BadRequest("prompt is one text or one list of token ids: send several as requests", param=param)

    def schema(self) -> dict[str, Any]:
        ids = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
        return {"anyOf": [{"type": "string"}, ids], "description": self.__doc__}


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8: JSON lets halves of characters through."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


Field = Number | Only | Flag | Words | Stops | Messages | Prompt
NONE_YET = "not implemented"
TOKENS = 1 << 20
COMMON: dict[str, Field] = {
    "model": Words("The base model's name or an adapter's: see /v1/models."),
    "max_tokens": Number(1, TOKENS, "The most tokens to write.", whole=True),
    "temperature": Number(0, 2, "0 takes the likeliest token; otherwise tokens are drawn.", 1),
    "top_p": Number(0, 1, "Draw only from the fewest tokens whose probabilities reach this.", 1),
    "seed": Number(-(1 << 53), 1 << 53, "The same seed draws the same answer.", whole=True),
    "stop": Stops(),
    "stream": Flag("Send the answer as it is written, as server-sent events."),
    "n": Only((1,), "one answer for each request", 1),
    "presence_penalty": Only((0, 0.0), NONE_YET, 0),
    "frequency_penalty": Only((0, 0.0), NONE_YET, 0),
    "logit_bias": Only(({},), NONE_YET),
    "user": Words("Not used."),
}
CHAT: dict[str, Field] = {
    "messages": Messages(),
    **COMMON,
    "max_completion_tokens": Number(1, TOKENS, "The same as max_tokens.", whole=True),
    "logprobs": Flag("Report the log-probability of every token."),
    "top_logprobs": Number(0, 20, "With logprobs: so many of the likeliest tokens too.", whole=True),
}
COMPLETION: dict[str, Field] = {
    "prompt": Prompt(),
    **COMMON,
    "logprobs": Number(0, 5, "Report log-probabilities, and so many of the likeliest tokens.", whole=True),
    "echo": Only((False,), NONE_YET, False),
    "best_of": Only((1,), NONE_YET, 1),
    "suffix": Only(("",), NONE_YET),
}
NEEDED = {"model", "messages", "prompt"}


def read(fields: Mapping[str, Field], body: Any) -> dict[str, Any]:
    """The values of a request, with defaults; null is as if the field were not there. Errors: `BadRequest`."""
    if not isinstance(body, Mapping):
        raise BadRequest("the body is a JSON object")
    body = {key: value for key, value in body.items() if value is not None}
    options = body.pop("stream_options", None)
    unknown = sorted(set(body) - set(fields))
    if unknown:
        raise BadRequest(f"unknown field {unknown[0]!r}", param=unknown[0][:100], code="unknown_parameter")
    for name in NEEDED & set(fields):
        if name not in body:
            raise BadRequest(f"{name} is missing", param=name)
    found = {name: field.read(body[name], name) if name in body else field.default for name, field in fields.items()}
    found["include_usage"] = read_options(options, found["stream"] is True)
    return found


def read_options(options: Any, stream: bool) -> bool:
    """Whether a stream ends with the usage counts."""
    if options is None:
        return False
    good = isinstance(options, Mapping) and isinstance(options.get("include_usage", False), bool)
    if not stream or not good or set(options) - {"include_usage", "include_obfuscation"}:
        raise BadRequest("stream_options goes with stream, and is {include_usage: true|false}", param="stream_options")
    return bool(options.get("include_usage", False))


def schema_of(fields: Mapping[str, Field]) -> dict[str, Any]:
    """The JSON schema of a request."""
    options = {"type": "object", "properties": {"include_usage": {"type": "boolean"}}, "additionalProperties": False}
    return {
        "type": "object",
        "required": sorted(NEEDED & set(fields)),
        "properties": {name: field.schema() for name, field in fields.items()} | {"stream_options": options},
        "additionalProperties": False,
    }


def description(version: str, *, token: bool) -> dict[str, Any]:
    """The OpenAPI description of the server."""
    error = {"type": "object", "properties": {"message": {"type": "string"}, "type": {"type": "string"}}}
    wrong = {"type": "object", "required": ["error"], "properties": {"error": error}}
    told = {"400": "What is wrong with the request.", "404": "No such model.", "413": "The body is too large."}
    told |= {"429": "The queue is full.", "503": "The server is shutting down."}
    told |= {"401": "The token is missing or wrong."} if token else {}
    failures = {
        status: {"description": words, "content": {"application/json": {"schema": wrong}}}
        for status, words in told.items()
    }
    answered = {"200": {"description": "The answer; with `stream`, server-sent events."}}

    def post(summary: str, fields: Mapping[str, Field]) -> dict[str, Any]:
        body = {"required": True, "content": {"application/json": {"schema": schema_of(fields)}}}
        return {"post": {"summary": summary, "requestBody": body, "responses": answered | failures}}

    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Trimtab", "version": version, "description": "Many adapters over one base model."},
        "paths": {
            "/v1/models": {"get": {"summary": "The base model and its adapters.", "responses": answered}},
            "/v1/chat/completions": post("Answer a talk.", CHAT),
            "/v1/completions": post("Go on with a text.", COMPLETION),
        },
    }
    if token:
        found["components"] = {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}}
        found["security"] = [{"token": []}]
    return found
