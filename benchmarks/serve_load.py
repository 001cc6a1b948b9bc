"""`trimtab serve` under load: clients with an adapter each against one client at a time, and too many at once.

    python benchmarks/serve_load.py [--adapters 8] [--clients 16] [--requests 48] [--tokens 32]

SmolLM2-135M-Instruct with `--adapters` LoRA adapters on all linears, drawn at random with B ≠ 0, served by a process of
its own. First one client asks a third of the requests, one after the other; then `--clients` clients ask all of them,
each request for another adapter, streamed; then five times as many requests as the server holds arrive at once. Every
answer of the crowd must be the text that the same request got alone. Writes `benchmarks/results/serve_load.json`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

RESULTS = Path(__file__).parent / "results"
MODEL = "smollm2-135m-instruct"
ROWS, QUEUE = 16, 16
PLACES = ("Lisbon", "a small ship", "the night train", "our garden", "an old clock", "the north wind", "two rivers")


def write_adapters(folder: Path, count: int) -> list[str]:
    """Save adapters that answer differently."""
    import torch

    import trimtab as tt
    from trimtab.models.loading import load

    model = load(MODEL, dtype="float32", device="cpu").model
    names = []
    for number in range(count):
        tt.attach(model, tt.LoRA(rank=8), "all-linear", seed=number)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".B"):
                    parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
        tt.save(model, folder / f"a{number}")
        tt.detach(model)
        names.append(f"a{number}")
    return names


def ask(client: httpx.Client, name: str, number: int, tokens: int) -> dict[str, Any]:
    """One streamed answer: its text, tokens, seconds to the first of them and to the end."""
    place = PLACES[number % len(PLACES)]
    body = {"model": name, "messages": [{"role": "user", "content": f"Write a line about {place}, number {number}."}]}
    body |= {"temperature": 0, "max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True}}
    began, first, text, count = time.perf_counter(), None, "", 0
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            answer.read()
            return {"status": answer.status_code}
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if event["choices"] and event["choices"][0]["delta"].get("content"):
                first = first or time.perf_counter() - began
                text += event["choices"][0]["delta"]["content"]
            if event.get("usage"):
                count = event["usage"]["completion_tokens"]
    return {"status": 200, "text": text, "tokens": count, "first": first, "seconds": time.perf_counter() - began}


def told(answers: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Tokens per second of all together, and how long single answers took."""
    first = [one["first"] for one in answers if one["first"] is not None]
    taken = sorted(one["seconds"] for one in answers)
    return {
        "requests": len(answers),
        "tokens": sum(one["tokens"] for one in answers),
        "tokens_per_second": sum(one["tokens"] for one in answers) / seconds,
        "seconds_to_first_text_median": statistics.median(first),
        "seconds_of_an_answer": {"median": statistics.median(taken), "95th": taken[int(0.95 * (len(taken) - 1))]},
    }


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--adapters", type=int, default=8)
    reader.add_argument("--clients", type=int, default=ROWS)
    reader.add_argument("--requests", type=int, default=48)
    reader.add_argument("--tokens", type=int, default=32)
    asked = reader.parse_args()
    with tempfile.TemporaryDirectory() as name:
        names = write_adapters(Path(name), asked.adapters)
        command = [sys.executable, "-m", "trimtab", "serve", MODEL, "--adapters", name, "--port", "0"]
        command += ["--rows", str(ROWS), "--queue", str(QUEUE), "--dtype", "float32"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            result = measured(server, names, asked)
        finally:
            server.terminate()
            left = server.wait(30)
    result["server_exit_code"] = left
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "serve_load.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def measured(server: subprocess.Popen[str], names: list[str], asked: argparse.Namespace) -> dict[str, Any]:
    """The three loads, one after the other."""
    import torch
    import transformers

    import trimtab as tt

    assert server.stdout is not None
    address = next(found[0] for line in server.stdout if (found := re.search(r"http://[\d.]+:\d+", line)))
    limits = httpx.Limits(max_connections=200)
    with httpx.Client(base_url=address, timeout=600, limits=limits) as client:

        def one(number: int) -> dict[str, Any]:
            return ask(client, names[number % len(names)], number, asked.tokens)

        one(0)
        alone, began = [], time.perf_counter()
        for number in range(asked.requests // 3):
            alone.append(one(number))
        result = {"alone": told(alone, time.perf_counter() - began)}
        began = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(asked.clients) as pool:
            crowd = list(pool.map(one, range(asked.requests)))
        result["crowd"] = told(crowd, time.perf_counter() - began)
        same = [a["text"] == b["text"] for a, b in zip(alone, crowd, strict=False)]
        result["same_text_as_alone"] = f"{sum(same)} of {len(same)}"
        many = 5 * (ROWS + QUEUE)
        with concurrent.futures.ThreadPoolExecutor(many) as pool:
            flood = [answer["status"] for answer in pool.map(one, range(many))]
        result["flood"] = {"requests": many, "statuses": {str(code): flood.count(code) for code in sorted(set(flood))}}
        result["health_after"] = client.get("/health").json()
    result["crowd_over_alone"] = result["crowd"]["tokens_per_second"] / result["alone"]["tokens_per_second"]
    threads = int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads()))
    conditions = {"model": MODEL, "dtype": "float32", "rows": ROWS, "queue": QUEUE, **vars(asked), "threads": threads}
    machine = {"processor": platform.machine(), "cpu": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count()}
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return result | {"conditions": conditions, "machine": machine, "versions": versions | {"trimtab": tt.__version__}}


if __name__ == "__main__":
    main()
