"""The HTTP application: requests are checked, worded and queued here, and answers sent as they come."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import threading
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from trimtab import __version__
from trimtab.core.errors import UserError, nearest
from trimtab.data.examples import PromptCompletion, Text
from trimtab.data.wording import inference_prompt
from trimtab.serve import protocol
from trimtab.serve.engine import Done, Engine, Failed, Job, Piece, QueueFull
from trimtab.serve.opening import Served, Wording
from trimtab.serve.protocol import BadRequest
from trimtab.serve.replies import Reply
from trimtab.serve.sampling import Choice, Sampling

COMPLETION_TOKENS = 16
"""What a completion writes where the request says nothing, as OpenAI's."""
WATCH_SECONDS = 0.25
"""How often it is looked whether the client of a waiting request is still there."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    body_bytes: int = 1 << 20
    max_tokens: int = 1024


class Server:
    """The application's state: the engine, the names it answers to, and the limits."""

    def __init__(
        self, served: Served, engine: Engine, *, token: str | None = None, limits: Limits | None = None
    ) -> None:
        self.served, self.engine, self.token, self.limits = served, engine, token, limits or Limits()
        self.created = int(time.time())
        self.wording = threading.Lock()  # a tokenizer is not made for several threads at once

    # ------------------------------------------------------------------------------------------------------- routes

    async def models(self, request: Request) -> Response:
        self.admit(request)
        listed = [
            {"id": name, "object": "model", "created": self.created, "owned_by": "trimtab"}
            for name in self.served.names
        ]
        return answer({"object": "list", "data": listed})

    async def model(self, request: Request) -> Response:
        self.admit(request)
        name = request.path_params["name"]
        self.named(name)
        return answer({"id": name, "object": "model", "created": self.created, "owned_by": "trimtab"})

    async def described(self, request: Request) -> Response:
        return answer(protocol.description(__version__, token=self.token is not None))

    async def health(self, request: Request) -> Response:
        return answer({"status": "ok"})

    async def chat(self, request: Request) -> Response:
        self.admit(request)
        body = protocol.read(protocol.CHAT, await self.body(request))
        if body["top_logprobs"] is not None and not body["logprobs"]:
            raise BadRequest("top_logprobs goes with logprobs", param="top_logprobs")
        if body["max_tokens"] and body["max_completion_tokens"]:
            raise BadRequest("give max_tokens or max_completion_tokens, not both", param="max_tokens")
        wording = self.named(body["model"])
        ids = await asyncio.to_thread(self.chat_ids, wording, body["messages"])
        wanted = body["max_completion_tokens"] or body["max_tokens"] or self.limits.max_tokens
        logs = (body["top_logprobs"] or 0) if body["logprobs"] else None
        return await self.respond(request, body, wording, ids, wanted, logs, chat=True)

    async def completion(self, request: Request) -> Response:
        self.admit(request)
        body = protocol.read(protocol.COMPLETION, await self.body(request))
        wording = self.named(body["model"])
        ids = await asyncio.to_thread(self.completion_ids, body["prompt"])
        wanted = body["max_tokens"] or min(COMPLETION_TOKENS, self.limits.max_tokens)
        return await self.respond(request, body, wording, ids, wanted, body["logprobs"], chat=False)

    # ------------------------------------------------------------------------------------------------ reading requests

    def admit(self, request: Request) -> None:
        """Compare the token, in a time that does not depend on how much of it is right."""
        if self.token is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode("utf-8", "surrogatepass"), self.token.encode())
        if kind.lower() != "bearer" or not same:
            raise BadRequest("the bearer token is missing or wrong", status=401, code="invalid_api_key")

    async def body(self, request: Request) -> Any:
        """The JSON of a request, not read beyond the limit."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise BadRequest("send JSON, with content-type: application/json", status=415)
        read = bytearray()
        async for chunk in request.stream():
            read += chunk
            if len(read) > self.limits.body_bytes:
                raise BadRequest(f"the body has more than {self.limits.body_bytes:,} bytes", status=413)
        try:
            return json.loads(bytes(read))
        except (ValueError, RecursionError):
            raise BadRequest("the body is not JSON") from None

    def named(self, name: str) -> Wording:
        """How prompts for a model name are worded."""
        if name not in self.served.names:
            close = nearest(name[:100], self.served.names, 1)
            fix = f"; did you mean {close[0]!r}?" if close else "; see /v1/models"
            raise BadRequest(f"no model {name[:100]!r}{fix}", param="model", status=404, code="model_not_found")
        return self.served.names[name]

    def chat_ids(self, wording: Wording, messages: list[dict[str, str]]) -> list[int]:
        """The token ids of a talk, worded as the model's training rows were."""
        if messages[-1]["role"] == "assistant":
            raise BadRequest("messages end with one to answer, not the assistant's", param="messages")
        if wording.template == "chat":
            return self.worded(lambda: inference_prompt(messages, self.served.tokenizer, template="chat"))
        if wording.adapter is None:
            raise BadRequest(
                "the base model has no chat template: use /v1/completions", param="model", code="no_chat_template"
            )
        system = "\n\n".join(one["content"] for one in messages[:-1])
        if any(one["role"] != "system" for one in messages[:-1]):
            raise BadRequest(
                "this adapter was not tuned on talks: send one user message, with a system message at most",
                param="messages",
            )
        plain = PromptCompletion(messages[-1]["content"], "", system)
        separator = wording.separator
        return self.worded(
            lambda: inference_prompt(plain, self.served.tokenizer, template="plain", separator=separator)
        )

    def completion_ids(self, prompt: str | list[int]) -> list[int]:
        """The token ids of a text as it stands, or ids that are checked."""
        if isinstance(prompt, str):
            return self.worded(lambda: inference_prompt(Text(prompt), self.served.tokenizer, template="plain"))
        config: Any = self.served.model.config
        size = config.get_text_config().vocab_size
        if max(prompt) >= size:
            raise BadRequest(f"a token id is not below {size}", param="prompt")
        return prompt

    def worded(self, make: Any) -> list[int]:
        """Token ids from a tokenizer; what it refuses is the request's fault."""
        try:
            with self.wording:
                return list(make())
        except UserError as error:
            raise BadRequest(error.message) from None

    # ------------------------------------------------------------------------------------------------------- answering

    async def respond(
        self,
        request: Request,
        body: Mapping[str, Any],
        wording: Wording,
        ids: list[int],
        wanted: int,
        logprobs: int | None,
        *,
        chat: bool,
    ) -> Response:
        """Queue a request and answer it, whole or as a stream."""
        if wanted > self.limits.max_tokens:
            raise BadRequest(f"max_tokens is at most {self.limits.max_tokens} here", param="max_tokens")
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def tell(event: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        sampling = Sampling(body["temperature"], body["top_p"], body["seed"], logprobs)
        job = Job(ids, wording.adapter, wanted, tell, sampling, body["stop"])
        try:
            self.engine.submit(job)
        except UserError as error:
            raise BadRequest(error.message, code="context_length_exceeded") from None
        except QueueFull:
            if self.engine.stopping:
                raise BadRequest("the server is shutting down", status=503) from None
            raise BadRequest("the queue is full: try again later", status=429, code="queue_full") from None
        reply = Reply(chat, body["model"], len(ids), self.served.tokenizer, logprobs)
        if body["stream"]:
            pieces = self.stream(job, events, reply, usage=body["include_usage"])
            return StreamingResponse(pieces, media_type="text/event-stream", headers={"cache-control": "no-store"})
        return answer(await self.whole(request, job, events, reply))

    async def whole(self, request: Request, job: Job, events: asyncio.Queue[Any], reply: Reply) -> dict[str, Any]:
        """Wait for all of an answer; a client that leaves takes it out of the queue."""
        text: list[str] = []
        tokens: list[Choice] = []
        try:
            while True:
                try:
                    event = await asyncio.wait_for(events.get(), WATCH_SECONDS)
                except asyncio.TimeoutError:
                    if await request.is_disconnected():
                        raise ClientDisconnect from None
                    continue
                if isinstance(event, Piece):
                    text.append(event.text)
                    tokens += event.tokens
                elif isinstance(event, Failed):
                    raise BadRequest(event.message, status=503 if self.engine.stopping else 500)
                else:
                    return reply.whole("".join(text), tokens, event.reason, event.written)
        finally:
            self.engine.cancel(job)

    async def stream(self, job: Job, events: asyncio.Queue[Any], reply: Reply, *, usage: bool) -> AsyncIterator[str]:
        """An answer as server-sent events; a client that leaves ends it."""
        try:
            if (opening := reply.opening()) is not None:
                yield sent(opening)
            while True:
                event = await events.get()
                if isinstance(event, Piece):
                    yield sent(reply.piece(event.text, event.tokens))
                elif isinstance(event, Failed):
                    yield sent(BadRequest(event.message, status=500).body())
                    return
                elif isinstance(event, Done):
                    yield sent(reply.ending(event.reason))
                    if usage:
                        yield sent(reply.counts(event.written))
                    yield "data: [DONE]\n\n"
                    return
        finally:
            self.engine.cancel(job)


def answer(document: Any, status: int = 200) -> Response:
    """A JSON document."""
    return Response(json.dumps(document), status, media_type="application/json")


def sent(document: Any) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(document)}\n\n"


async def refused(request: Request, error: Exception) -> Response:
    """What is wrong with a request, in OpenAI's shape."""
    assert isinstance(error, BadRequest)
    return answer(error.body(), error.status)


async def not_served(request: Request, error: Exception) -> Response:
    """A path or a verb that is not served."""
    assert isinstance(error, HTTPException)
    return answer(BadRequest(error.detail, status=error.status_code).body(), error.status_code)


async def gone(request: Request, error: Exception) -> Response:
    """The client has left; nobody reads this."""
    return Response(status_code=499)


def application(
    served: Served,
    engine: Engine,
    *,
    token: str | None = None,
    limits: Limits | None = None,
    hosts: tuple[str, ...] = ("*",),
) -> Starlette:
    """The application. `hosts` are the names it may be addressed by, so that a web page cannot reach a local server
    under a name of its own."""
    server = Server(served, engine, token=token, limits=limits)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(engine.stop)

    return Starlette(
        routes=[
            Route("/v1/models", server.models),
            Route("/v1/models/{name}", server.model),
            Route("/v1/chat/completions", server.chat, methods=["POST"]),
            Route("/v1/completions", server.completion, methods=["POST"]),
            Route("/openapi.json", server.described),
            Route("/health", server.health),
        ],
        exception_handlers={BadRequest: refused, HTTPException: not_served, ClientDisconnect: gone},
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)],
        lifespan=lifespan,
    )
