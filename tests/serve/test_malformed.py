"""A thousand requests made from the server's own description, most of them wrong: no fault, and nothing left behind."""

from __future__ import annotations

import concurrent.futures
import copy
import json
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from tests.serve.conftest import serving, wait_for

httpx = pytest.importorskip("httpx")

JUNK: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 0.5, 1e308, -1e308, 10**400, -(10**30), float("nan"), float("inf")),
    *("", "x", "\ud800", "\x00", "../../etc/passwd", "<a></>{{ messages }}{% raw %}", "é" * 300, "user", "base"),
    *([], [[]], [None], ["a", "b"], [1, 2, 3], [-1], [10**20], [[1], [2]], {}, {"role": "user"}, {"": {}}, [{}] * 3),
    [{"role": "user", "content": "x"}],
    [{"role": ["user"], "content": [{"type": "text", "text": None}]}],
    [{"role": "assistant", "content": "x"}],
]


def valid(schema: dict[str, Any], draw: random.Random) -> Any:
    """A value that a schema allows, mostly."""
    if "anyOf" in schema:
        return valid(draw.choice(schema["anyOf"]), draw)
    if "enum" in schema:
        return draw.choice(schema["enum"])
    kind = schema["type"]
    if kind == "object":
        needed = set(schema.get("required", ()))
        names = [name for name in schema["properties"] if name in needed or draw.random() < 0.3]
        return {name: valid(schema["properties"][name], draw) for name in names}
    if kind == "array":
        return [valid(schema["items"], draw) for _ in range(draw.randint(schema.get("minItems", 0), 3))]
    if kind == "boolean":
        return draw.random() < 0.5
    if kind == "string":
        return "".join(draw.choice("abc <>/\n{}é") for _ in range(draw.randint(1, 8)))
    low, high = schema.get("minimum", 0), min(schema.get("maximum", 9), 9)
    return draw.randint(int(low), int(high)) if kind == "integer" else draw.uniform(low, high)


def spoil(value: Any, draw: random.Random) -> Any:
    """A value with something in it replaced, taken away or added."""
    value = copy.deepcopy(value)
    holder, key = value, None
    while isinstance(holder, dict | list) and holder:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = draw.choice(keys)
        if draw.random() < 0.6 or not isinstance(holder[key], dict | list) or not holder[key]:
            break
        holder = holder[key]
    if key is None or draw.random() < 0.05:
        return draw.choice(JUNK)
    change = draw.random()
    if change < 0.7:
        holder[key] = draw.choice(JUNK)
    elif change < 0.85:
        del holder[key]
    elif isinstance(holder, dict):
        holder[draw.choice(["tools", "\ud800", "", "Model", "x" * 500])] = draw.choice(JUNK)
    else:
        holder.append(draw.choice(JUNK))
    return value


def raw(body: Any, draw: random.Random) -> bytes:
    """The bytes of a request, now and then damaged."""
    text = json.dumps(body).encode()
    chance = draw.random()
    if chance < 0.05:
        return text[: draw.randint(0, len(text))]
    if chance < 0.08:
        at = draw.randint(0, len(text))
        return text[:at] + bytes([draw.randint(0, 255)]) + text[at:]
    return text


def requests(description: dict[str, Any], names: list[str], count: int) -> Iterator[tuple[str, bytes, str]]:
    """(path, body, content type) of requests, three in four of them spoiled."""
    draw = random.Random(0)
    posts = {path: entry["post"] for path, entry in description["paths"].items() if "post" in entry}
    assert len(posts) == 2
    for _ in range(count):
        path = draw.choice(sorted(posts))
        body = valid(posts[path]["requestBody"]["content"]["application/json"]["schema"], draw)
        body |= {"model": draw.choice(names), "max_tokens": draw.randint(1, 4)}
        body.pop("max_completion_tokens", None)
        for _ in range(draw.choice([0, 1, 1, 2])):
            body = spoil(body, draw)
        yield path, raw(body, draw), draw.choice(["application/json"] * 19 + ["text/plain"])


def test_a_thousand_malformed_requests(model: Any, words: Any) -> None:
    from trimtab.serve.application import Limits

    with serving(model, words, limits=Limits(max_tokens=6)) as server, httpx.Client(base_url=server.address) as client:

        def one(request: tuple[str, bytes, str]) -> int:
            path, sent, kind = request
            found = client.post(path, content=sent, headers={"content-type": kind}, timeout=60)
            told = f"{path} {sent[:300]!r} -> {found.status_code} {found.text[:300]}"
            assert found.status_code in (200, 400, 404, 413, 415), told
            if found.status_code != 200:
                assert found.json()["error"]["message"], told
            elif found.headers["content-type"].startswith("text/event-stream"):
                assert found.text.endswith("data: [DONE]\n\n"), told
            return int(found.status_code)

        names = [one["id"] for one in client.get("/v1/models").json()["data"]]
        wanted = requests(client.get("/openapi.json").json(), names, 1000)
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            seen = Counter(pool.map(one, wanted))
        assert seen[200] > 100, seen
        assert seen[400] > 400, seen
        wait_for(server.empty)
        assert server.engine.thread.is_alive()
        assert client.post("/v1/completions", json={"model": "base", "prompt": "ab"}).status_code == 200
