"""LongLoRA on a byte model trained from scratch: perplexity at two and four times its context, before and after.

    python benchmarks/longlora.py [--steps 600] [--tune 100]

The text is the source of Python's own standard library, a held-out part of its files for measuring. A small Llama is
trained on 128 bytes at a time. Then its context is lengthened to 512 by interpolating rotary positions, and it is tuned
on 512: as LongLoRA is meant (LoRA, embeddings and norms, attention in shifted groups of 128), and for comparison with
whole attention and with LoRA alone. All are measured with whole attention. Writes `benchmarks/results/longlora.json`;
four and a half minutes on one core.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import sysconfig
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import trimtab as tt
from trimtab.engine.shifted_attention import shifted_in
from trimtab.models.context import lengthen

RESULTS = Path(__file__).parent / "results"
SHORT, LONG, GROUP = 128, 512, 128
LENGTHS = (128, 256, 512)
RATE = 2e-3


def corpus() -> tuple[Tensor, Tensor]:
    """Bytes of the standard library: for training, and of every twelfth file for measuring."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts: tuple[bytearray, bytearray] = (bytearray(), bytearray())
    for at, file in enumerate(files):
        parts[at % 12 == 0].extend(file.read_bytes())
    train, heldout = (torch.frombuffer(part, dtype=torch.uint8).long() for part in parts)
    return train, heldout


def small_llama() -> Any:
    """A Llama of 0.8 million parameters over bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=SHORT,
    )
    return LlamaForCausalLM(config)


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """Mean loss per byte."""
    logits = model(ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def train(model: Any, text: Tensor, length: int, rows: int, steps: int, rate: float) -> float:
    """AdamW with a short rise and a linear fall; returns seconds."""
    draw = torch.Generator().manual_seed(1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    started = time.perf_counter()
    model.train()
    for step in range(steps):
        at = torch.randint(len(text) - length, (rows, 1), generator=draw)
        loss = loss_of(model, text[at + torch.arange(length)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = rate * min((step + 1) / 20, 1 - step / steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
    return round(time.perf_counter() - started, 1)


@torch.no_grad()
def perplexities(model: Any, text: Tensor) -> dict[str, float]:
    """Perplexity per byte of held-out text in pieces of each length, and of the last quarter of each piece alone."""
    found = {}
    for length in LENGTHS:
        pieces = text[: 65536 // length * length].view(-1, length)
        total, last = 0.0, 0.0
        for part in pieces.split(8192 // length):
            logits = model(part, use_cache=False).logits[:, :-1]
            each = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none").view(len(part), -1)
            total += float(each.mean(1).sum())
            last += float(each[:, -length // 4 :].mean(1).sum())
        found[f"{length}"] = round(math.exp(total / len(pieces)), 3)
        found[f"{length}, last quarter"] = round(math.exp(last / len(pieces)), 3)
    return found


def lengthened(weights: dict[str, Tensor]) -> Any:
    """The trained model with room for `LONG` bytes."""
    from transformers import LlamaForCausalLM

    config = copy.deepcopy(small_llama().config)
    lengthen(config, LONG, "the model")
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights)
    return model.eval()


def attention(model: Any, kind: str) -> AbstractContextManager[None]:
    """What a model is tuned in."""
    return shifted_in(model, GROUP) if kind == "shifted" else nullcontext()


def main() -> None:
    """Train, lengthen, tune, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600, help="steps from scratch, 16 rows of 128 bytes each")
    parser.add_argument("--tune", type=int, default=100, help="steps of tuning, 4 rows of 512 bytes each")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    text, heldout = corpus()
    model = small_llama()
    seconds = train(model, text, SHORT, 16, asked.steps, 3e-3)
    results: dict[str, Any] = {"untuned": perplexities(model, heldout) | {"seconds": seconds}}
    weights = model.state_dict()
    results["untuned, positions interpolated"] = perplexities(lengthened(weights), heldout)
    parts = {"LongLoRA": ("shifted", tt.LongLoRA()), "LongLoRA, whole attention": ("full", tt.LongLoRA())}
    parts["LoRA alone, shifted"] = ("shifted", tt.LoRA().at("q, k, v, o"))
    for name, (kind, method) in parts.items():
        tuned = tt.attach(lengthened(weights), method)
        with attention(tuned, kind):
            seconds = train(tuned, text, LONG, 4, asked.tune, RATE)
        results[name] = perplexities(tuned, heldout) | {"seconds": seconds}
        print(name, results[name], flush=True)
    for name, one in results.items():
        print(f"{name:34}", *(f"{length}: {one[length]:8.3f}" for length in map(str, LENGTHS)))
    facts = {"steps": asked.steps, "tune": asked.tune, "own_context": SHORT, "context": LONG, "group": GROUP}
    facts |= {"machine": platform.machine(), "threads": 1, "torch": torch.__version__}
    facts |= {"python": platform.python_version(), "parameters": sum(p.numel() for p in model.parameters())}
    RESULTS.mkdir(exist_ok=True)
    text_out = json.dumps({"conditions": facts, "perplexity_per_byte": results}, indent=1) + "\n"
    (RESULTS / "longlora.json").write_text(text_out, encoding="utf-8")


if __name__ == "__main__":
    main()
