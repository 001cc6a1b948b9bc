"""A tiny model with adapters of several methods behind a server, and what it should answer."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.evaluate.tiny_generators import decoder

import trimtab as tt

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

METHODS: dict[str, Any] = {
    "lora-2": tt.LoRA(rank=2),
    "lora-5": tt.LoRA(rank=5, alpha=4),
    "dora": tt.DoRA(rank=2),
    "ia3": tt.IA3(),
    "prefix": tt.PrefixTuning(length=3),
    "prompt": tt.PromptTuning(length=2),
    "reft": tt.LoReFT(rank=2),
    "norms": tt.LNTuning(),
}
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'][0] }}>{{ message['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def tuned() -> Any:
    """The model with every method attached, none at its start, none active."""
    model = decoder("llama", max_position_embeddings=96)
    for name, method in METHODS.items():
        tt.attach(model, method, name=name)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape, generator=generator)
    tt.activate(model, None)
    return model.requires_grad_(False)


def talking(words: Any) -> Any:
    """The tokenizer with a chat template."""
    words.chat_template = TEMPLATE
    return words


@pytest.fixture(scope="session")
def model() -> Any:
    return tuned()


@pytest.fixture(scope="session")
def words() -> Any:
    from tests.evaluate.tiny_generators import byte_tokenizer

    return talking(byte_tokenizer())


@contextmanager
def serving(model: Any, words: Any, *, engine: dict[str, Any] | None = None, **settings: Any) -> Iterator[Any]:
    """A server in a thread; yields its address, its engine and the running host."""
    from trimtab.serve.application import application
    from trimtab.serve.engine import Engine
    from trimtab.serve.opening import Served, Wording
    from trimtab.serve.running import host

    made = Engine(model, words, **(engine or {}))
    names = {"base": Wording(None, "chat")} | {name: Wording(name, "chat") for name in METHODS}
    names["reft"] = Wording("reft", "plain", " ->")
    app = application(Served(model, words, names), made, **settings)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        running = host(app, made)
        running.handle_exit = None  # type: ignore[method-assign,assignment]
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_for(lambda: running.started)
            yield Place(f"http://127.0.0.1:{listener.getsockname()[1]}", made)
        finally:
            running.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
            assert not made.thread.is_alive()


class Place:
    """Where a server is, and its engine."""

    def __init__(self, address: str, engine: Any) -> None:
        self.address, self.engine = address, engine

    def empty(self) -> bool:
        """Whether no request is left anywhere."""
        return not (self.engine.waiting or self.engine.running or self.engine.lanes)


def wait_for(done: Callable[[], Any], seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def server(model: Any, words: Any) -> Iterator[Any]:
    with serving(model, words) as found:
        yield found
