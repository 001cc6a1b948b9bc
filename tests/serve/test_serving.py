"""The server through OpenAI's own client and through raw requests: answers, streams, refusals, limits, leaving."""

from __future__ import annotations

import concurrent.futures
import json
import socket
from typing import Any

import pytest
from tests.serve.conftest import METHODS, serving, wait_for

import trimtab as tt
from trimtab.core.errors import UserError
from trimtab.data.examples import PromptCompletion
from trimtab.data.wording import inference_prompt
from trimtab.evaluate.generate import generate

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")


def client_of(server: Any, token: str = "none") -> Any:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key=token, max_retries=0, timeout=30)


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def alone(model: Any, words: Any, name: str | None, ids: list[int], count: int) -> str:
    """What `generate` answers with one adapter, nothing else in the batch."""
    tt.activate(model, name)
    try:
        return generate(model, words, [ids], count)[0]
    finally:
        tt.activate(model, None)


QUESTIONS = {None: "hello there", **{name: f"tell me of {name}" for name in METHODS}}


@pytest.fixture(scope="module")
def answers(model: Any, words: Any) -> dict[str | None, str]:
    """The greedy answer to its question of every adapter: made before any server runs on the model."""
    found = {}
    for name, text in QUESTIONS.items():
        if name == "reft":
            ids = inference_prompt(PromptCompletion(text, ""), words, template="plain", separator=" ->")
        else:
            ids = inference_prompt(ask(text), words, template="chat")
        found[name] = alone(model, words, name, ids, 24)
    assert len(set(found.values())) == len(found), "adapters that answer alike show nothing"
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_mixed_adapters_in_flight_answer_as_alone(answers: Any, server: Any, stream: bool) -> None:
    client = client_of(server)

    def one(name: str | None) -> str:
        given = {"model": name or "base", "messages": ask(QUESTIONS[name]), "temperature": 0, "max_tokens": 24}
        if not stream:
            return str(client.chat.completions.create(**given).choices[0].message.content)
        pieces = client.chat.completions.create(**given, stream=True)
        return "".join(piece.choices[0].delta.content or "" for piece in pieces)

    names = [*QUESTIONS] * 3
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        found = list(pool.map(one, names))
    assert found == [answers[name] for name in names]
    wait_for(server.empty)


def test_models_are_listed(server: Any) -> None:
    client = client_of(server)
    assert [one.id for one in client.models.list()] == ["base", *METHODS]
    assert client.models.retrieve("dora").id == "dora"
    with pytest.raises(openai.NotFoundError, match=r"no model 'dura'; did you mean 'dora'\?"):
        client.models.retrieve("dura")


def test_completions_count_stop_and_stream(model: Any, words: Any, server: Any) -> None:
    client = client_of(server)
    given: dict[str, Any] = {"model": "base", "prompt": "abc", "temperature": 0}
    whole = client.completions.create(**given, max_tokens=20)
    text = whole.choices[0].text
    ids = words("abc")["input_ids"]
    assert (whole.usage.prompt_tokens, whole.usage.total_tokens) == (3, 3 + whole.usage.completion_tokens)
    assert client.completions.create(**given | {"prompt": ids}, max_tokens=20).choices[0].text == text
    pieces = list(
        client.completions.create(**given, max_tokens=20, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(one.choices[0].text for one in pieces if one.choices) == text
    assert pieces[-1].usage == whole.usage
    assert [one.choices[0].finish_reason for one in pieces[:-1]][-1] == whole.choices[0].finish_reason == "length"
    assert client.completions.create(**given).usage.completion_tokens == 16
    stop = text[4:7]
    cut = client.completions.create(**given, max_tokens=20, stop=[stop, "never"])
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (text[: text.index(stop)], "stop")
    streamed = client.completions.create(**given, max_tokens=20, stop=stop, stream=True)
    assert "".join(one.choices[0].text for one in streamed) == text[: text.index(stop)]


def test_a_seed_draws_the_same_whatever_else_runs(server: Any) -> None:
    client = client_of(server)

    def drawn(seed: int, **more: Any) -> str:
        given = {"temperature": 1.5, "seed": seed, "max_tokens": 12} | more
        return str(client.completions.create(model="lora-2", prompt="abc", **given).choices[0].text)

    first = drawn(1)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        found = list(pool.map(drawn, [1, 2, 1, 3, 1, 4]))
    assert found[0] == found[2] == found[4] == first
    assert len({*found}) == 4
    assert drawn(5, top_p=0) == drawn(6, temperature=0)


def test_log_probabilities_are_the_models(model: Any, words: Any, server: Any) -> None:
    import torch

    client = client_of(server)
    given = {"model": "lora-5", "max_tokens": 5, "temperature": 0}
    found = client.completions.create(**given, prompt="abc", logprobs=2).choices[0].logprobs
    chat = client.chat.completions.create(**given, messages=ask("x"), logprobs=True, top_logprobs=3).choices[0].logprobs
    assert len(found.tokens) == len(chat.content) == 5
    assert all(len(one.top_logprobs) == 3 and one.logprob == one.top_logprobs[0].logprob for one in chat.content)
    wait_for(server.empty)
    tt.activate(model, "lora-5")
    with torch.no_grad():
        logs = model(torch.tensor([words("abc")["input_ids"]])).logits[0, -1].log_softmax(-1)
    tt.activate(model, None)
    assert found.token_logprobs[0] == pytest.approx(float(logs.max()), abs=1e-4)
    assert len(found.top_logprobs[0]) <= 2


REFUSED = {
    "no such model": ({"model": "nobody"}, 404, "no model"),
    "several answers": ({"n": 2}, 400, "n can only be 1"),
    "penalty": ({"presence_penalty": 0.5}, 400, "presence_penalty can only be"),
    "unknown field": ({"tools": []}, 400, "unknown field 'tools'"),
    "too many tokens": ({"max_tokens": 5000}, 400, "at most 1024"),
    "cold": ({"temperature": -1}, 400, "a number from 0 to 2"),
    "not a number": ({"temperature": "1"}, 400, "a number from 0 to 2"),
    "true is no number": ({"max_tokens": True}, 400, "a whole number"),
    "no messages": ({"messages": []}, 400, "at least one message"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        *(400, "content is a text"),
    ),
    "a tool's turn": ({"messages": [{"role": "tool", "content": "x"}]}, 400, "has a role"),
    "assistant last": ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "not the assistant's"),
    "too long": ({"messages": [{"role": "user", "content": "x" * 200}]}, 400, "tokens; the model takes"),
    "half a character": ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "content is a text"),
    "top without logs": ({"top_logprobs": 2}, 400, "goes with logprobs"),
    "options without stream": ({"stream_options": {"include_usage": True}}, 400, "goes with stream"),
    "a talk to a plain adapter": (
        {"model": "reft", "messages": [*ask("a"), {"role": "assistant", "content": "b"}, *ask("c")]},
        *(400, "not tuned on talks"),
    ),
    "a path for a name": ({"model": "../../etc/passwd"}, 404, "no model"),
}


@pytest.mark.parametrize("change, status, told", REFUSED.values(), ids=REFUSED)
def test_what_is_refused_says_why(server: Any, change: dict[str, Any], status: int, told: str) -> None:
    body = {"model": "base", "messages": ask("x"), "max_tokens": 2} | change
    found = httpx.post(
        f"{server.address}/v1/chat/completions", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert (found.status_code, set(found.json()["error"])) == (status, {"message", "type", "param", "code"})
    assert told in found.json()["error"]["message"]
    assert server.empty()


def test_bodies_that_are_no_requests(server: Any) -> None:
    where = f"{server.address}/v1/completions"
    kind = {"content-type": "application/json"}
    for body in (b"", b"{", b"[]", b"nul", b"\xff\xfe", b"[" * 100_000, b'{"model":' + b"1" * 6000 + b"}"):
        assert httpx.post(where, content=body, headers=kind).status_code == 400
    assert httpx.post(where, content=b"x" * ((1 << 20) + 1), headers=kind).status_code == 413
    assert httpx.post(where, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert httpx.get(where).status_code == 405
    assert httpx.get(f"{server.address}/v1/files").json()["error"]["type"] == "not_found_error"
    assert httpx.get(f"{server.address}/../../etc/passwd").status_code == 404


def test_the_token_is_asked_for(model: Any, words: Any) -> None:
    with serving(model, words, token="s3cret") as server:
        assert len(client_of(server, "s3cret").models.list().data) == 1 + len(METHODS)
        for wrong in ("s3cre", "s3cret!", "ünlike"):
            headers = {"authorization": f"Bearer {wrong}".encode()}
            assert httpx.get(f"{server.address}/v1/models", headers=headers).status_code == 401
        with pytest.raises(openai.AuthenticationError, match="bearer token"):
            client_of(server, "no").completions.create(model="base", prompt="x")


def test_a_page_under_a_name_of_its_own_does_not_reach_a_local_server(model: Any, words: Any) -> None:
    with serving(model, words, hosts=("127.0.0.1", "localhost")) as server:
        assert httpx.get(f"{server.address}/v1/models").status_code == 200
        assert httpx.get(f"{server.address}/v1/models", headers={"host": "evil.example"}).status_code == 400


def test_a_full_queue_says_so_and_empties(model: Any, words: Any) -> None:
    with serving(model, words, engine={"rows": 1, "queue": 2}) as server:
        client = client_of(server)

        def one(number: int) -> int:
            try:
                client.completions.create(model="base", prompt="ab", max_tokens=60, temperature=0)
            except openai.RateLimitError as error:
                return error.status_code if "queue is full" in str(error) else 0
            return 200

        with concurrent.futures.ThreadPoolExecutor(10) as pool:
            found = list(pool.map(one, range(10)))
        assert {*found} == {200, 429}
        wait_for(server.empty)
        assert one(0) == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("waits", [False, True], ids=["running", "waiting"])
def test_a_client_that_leaves_frees_its_place(model: Any, words: Any, stream: bool, waits: bool) -> None:
    import threading

    held = threading.Event()
    with serving(model, words, engine={"rows": 1}) as server:
        engine = server.engine
        real = engine.turn
        engine.turn = lambda *given: (held.wait(0.3), real(*given))  # slow steps
        others = [post_and_keep(server, stream) for _ in range(2 if waits else 1)]
        wait_for(lambda: len(engine.running) == 1 and len(engine.waiting) == len(others) - 1)
        job = engine.waiting[0] if waits else next(iter(engine.running.values()))
        others[-1].close()
        wait_for(lambda: job.cancelled and job not in engine.waiting and job not in engine.running.values())
        held.set()
        for one in others:
            one.close()
        wait_for(server.empty)


def post_and_keep(server: Any, stream: bool) -> socket.socket:
    """A request whose connection stays open."""
    host, _, port = server.address.removeprefix("http://").partition(":")
    one = socket.create_connection((host, int(port)))
    body = json.dumps({"model": "base", "prompt": "ab", "max_tokens": 90, "temperature": 0, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    one.sendall(head.encode() + b"\r\n\r\n" + body)
    return one


def test_a_step_that_fails_ends_its_rows_and_not_the_server(model: Any, words: Any) -> None:
    with serving(model, words) as server:
        real, client = server.engine.model.forward, client_of(server)
        server.engine.lanes.clear()

        def broken(*_: Any, **__: Any) -> Any:
            raise RuntimeError("no memory left")

        from trimtab.serve.lane import Lane

        kept = Lane.forward
        Lane.forward = broken  # type: ignore[method-assign]
        try:
            with pytest.raises(openai.InternalServerError, match="RuntimeError"):
                client.completions.create(model="base", prompt="ab")
        finally:
            Lane.forward = kept  # type: ignore[method-assign]
        wait_for(server.empty)
        assert client.completions.create(model="base", prompt="ab").choices[0].text
        assert server.engine.model.forward == real


def test_shutting_down_ends_streams(model: Any, words: Any) -> None:
    with serving(model, words) as server:
        real = server.engine.turn
        server.engine.turn = lambda *given: (__import__("time").sleep(0.05), real(*given))
        pieces = client_of(server).completions.create(model="base", prompt="ab", max_tokens=90, stream=True)
        next(iter(pieces))
        server.engine.stop(wait=False)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(pieces)


def test_models_that_cannot_be_served_are_told(words: Any) -> None:
    from tests.evaluate.tiny_generators import decoder

    from trimtab.serve.engine import Engine

    windowed = decoder("mistral", sliding_window=4, num_key_value_heads=2, intermediate_size=48)
    Engine(windowed, words)
    tt.attach(windowed, tt.PrefixTuning(length=2), name="p")
    with pytest.raises(UserError, match="within a window"):
        Engine(windowed, words)
