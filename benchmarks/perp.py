"""Retraining after pruning: how much of the perplexity that pruning costs comes back from biases and norms alone.

    python benchmarks/perp.py --data DIR [--score magnitude|wanda] [--of 4] [--method perp|mask_lora|scale_lora]

DIR holds WikiText-2: `part_train_1MB.txt` (or `wiki.train.raw`) and `wiki.test.raw`. SmolLM2-135M-Instruct is pruned to
half in all linear layers of its blocks, then retrained on the training text. Perplexity on the first `--eval-tokens` of
the test text, in windows of `--length` tokens without overlap, each predicted from its own beginning. Adds an entry to
`benchmarks/results/perp.json`. The dense model is not retrained, so part of what comes back is the style of the text;
`--sparsity 0` measures how much retraining alone gives.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import trimtab as tt
from trimtab.engine.faster import running
from trimtab.engine.loss import loss_sum
from trimtab.models.loading import load

RESULTS = Path(__file__).parent / "results" / "perp.json"
MODEL = "smollm2-135m-instruct"
CALIBRATION = 16
"""Windows that Wanda's input norms are measured on."""


def windows(tokenizer: Any, path: Path, length: int, limit: int | None = None) -> torch.Tensor:
    """A text as token ids (windows, length); what does not fill the last window is left out."""
    text = path.read_text(encoding="utf-8")
    if limit is not None:
        text = text[: 12 * limit]  # far more characters than that many tokens have
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False)["input_ids"][0][:limit]
    return ids[: len(ids) // length * length].view(-1, length)


def batch_of(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Windows as a batch in which every token but the first of a window is predicted."""
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def perplexity(model: Any, ids: torch.Tensor, size: int = 2) -> float:
    """exp of the mean loss per predicted token."""
    with torch.no_grad(), running(model, packed=False):
        total = sum(float(loss_sum(model, batch_of(part), "causal")[0]) for part in ids.split(size))
    return math.exp(total / (ids.shape[0] * (ids.shape[1] - 1)))


def retrain(model: Any, ids: torch.Tensor, asked: argparse.Namespace, rate: float) -> float:
    """AdamW over shuffled windows, a linear rise over a tenth of the steps and a linear fall; returns the seconds."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(asked.seed)
    order = torch.randperm(len(ids), generator=generator).tolist()
    warm = max(1, asked.steps // 10)
    started = time.perf_counter()
    model.train()
    with running(model, packed=False):
        for step in range(asked.steps):
            part = ids[[order[(step * asked.batch + n) % len(order)] for n in range(asked.batch)]]
            loss = loss_sum(model, batch_of(part), "causal")[0] / (part.shape[0] * (part.shape[1] - 1))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = rate * min((step + 1) / warm, (asked.steps - step) / max(1, asked.steps - warm))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % 10 == 0:
                print(f"step {step} loss {loss.item():.4f} {time.perf_counter() - started:.0f} s", flush=True)
    model.eval()
    return time.perf_counter() - started


def zeros(model: Any) -> dict[str, torch.Tensor]:
    """Where the weights of the linear layers are zero."""
    places = tt.select(model, "all-linear")
    return {place.name: model.get_submodule(place.module)._parameters["weight"] == 0 for place in places}


def run(asked: argparse.Namespace) -> dict[str, Any]:
    """Measure, prune, measure, retrain, measure, merge, measure."""
    loaded = load(MODEL, dtype="float32", device="cpu")
    model: Any = loaded.model
    model.requires_grad_(False)
    text = next(path for name in ("wiki.train.raw", "part_train_1MB.txt") if (path := asked.data / name).is_file())
    train = windows(loaded.tokenizer, text, asked.length, asked.train_tokens)
    test = windows(loaded.tokenizer, asked.data / "wiki.test.raw", asked.length, asked.eval_tokens)
    found: dict[str, Any] = {"dense": perplexity(model, test)}
    print("dense", found["dense"], flush=True)
    covariance = None
    if asked.score == "wanda":
        rows = [{"input_ids": part} for part in train[:CALIBRATION].split(2)]
        covariance = tt.covariance(model, rows)
    tt.prune(model, asked.sparsity, covariance=covariance, of=asked.of)
    mask = zeros(model)
    found["pruned"] = perplexity(model, test)
    print("pruned", found["pruned"], flush=True)
    method: Any = {"perp": tt.PERP, "mask_lora": tt.MaskLoRA, "scale_lora": tt.ScaleLoRA}[asked.method]()
    tt.attach(model, method, seed=asked.seed)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters()) - trained
    first = method[0].method if isinstance(method, tuple) else method
    rate = asked.learning_rate or first.rate(model.config.hidden_size)
    seconds = retrain(model, train, asked, rate)
    found["retrained"] = perplexity(model, test)
    print("retrained", found["retrained"], flush=True)
    tt.merge(model)
    after = zeros(model)
    lost = found["pruned"] - found["dense"]
    recovered = (found["pruned"] - found["retrained"]) / lost if lost else None
    return {
        "perplexity": found,
        "recovered_of_lost_perplexity": recovered,
        "trained": trained,
        "share_trained": trained / total,
        "zeros_kept_after_merge": all(torch.equal(after[name], mask[name]) for name in mask),
        "retraining_seconds": seconds,
        "retraining_tokens": asked.steps * asked.batch * asked.length,
        "learning_rate": rate,
        "settings": {
            key: str(value) if key == "data" else value for key, value in vars(asked).items() if key != "data"
        },
        "conditions": {
            "model": MODEL,
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
            "note": "SmolLM2 is dequantized from Q4_1, not the original; fp32",
        },
    }


def main() -> None:
    """Run one setting and add it to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--score", choices=("magnitude", "wanda"), default="magnitude")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--of", type=int)
    parser.add_argument("--method", choices=("perp", "mask_lora", "scale_lora"), default="perp")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--eval-tokens", type=int, default=16384)
    parser.add_argument("--train-tokens", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="print, but do not write the results")
    asked = parser.parse_args()
    result = run(asked)
    print(json.dumps(result, indent=1))
    if asked.dry:
        return
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    pattern = f"-{asked.of}" if asked.of else ""
    found[f"{asked.method}-{asked.score}-{asked.sparsity:g}{pattern}"] = result
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
