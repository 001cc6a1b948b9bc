"""What a training step of DoRA, of LoRA over NF4, and of LoRA without fast pieces or in compiled blocks costs beside
LoRA's: SmolLM2-135M's shapes with random weights.

    python benchmarks/step_cost.py [--rounds 7] [--rows 2] [--length 256] [--rank 8]

Copies of one model, an adapter on all linear layers of each, take steps in turns (forward, backward, AdamW), inside the
fast pieces that `trimtab tune` uses but for the last two. Writes `benchmarks/results/step_cost.json`: median seconds of
each, the median of the ratios of neighbouring steps to LoRA's, the bits a quantized weight takes, and how many tensors
of an adapted weight's size one step of each makes (over dense weights none; NF4 is decoded layer by layer).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import trimtab as tt
from trimtab.core.quantized import quantize, quantized_modules
from trimtab.engine.faster import faster
from trimtab.engine.regional import compiled
from trimtab.laws.numbers import Sizes

RESULTS = Path(__file__).parent / "results" / "step_cost.json"
SHAPES = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def model(layers: int, method: Any, format: Any = None) -> nn.Module:
    """A random Llama of SmolLM2's shapes with an adapter on all linear layers, their weights in a format."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(num_hidden_layers=layers, use_cache=False, **SHAPES)
    made = transformers.LlamaForCausalLM(config)
    return tt.attach(made if format is None else quantize(made, format), method).train()


def bits(made: nn.Module) -> float | None:
    """Bits stored for a weight of the quantized layers, scales and all; None where nothing is quantized."""
    codes = [module._modules["code"] for _, module in quantized_modules(made)]
    count = sum(code.shape[0] * code.shape[1] for code in codes)  # type: ignore[union-attr,index]
    return 8 * sum(code.nbytes for code in codes) / count if codes else None  # type: ignore[union-attr,misc]


class Steps:
    """A model with its optimizer; call it for one step."""

    def __init__(self, made: nn.Module, ids: Tensor) -> None:
        self.model, self.ids = made, ids
        self.optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=1e-4)

    def backward(self) -> None:
        """Forward and backward."""
        logits = self.model(input_ids=self.ids).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), self.ids[:, 1:].flatten()).backward()

    def __call__(self) -> float:
        """Seconds of one step."""
        started = time.perf_counter()
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    def weights_built(self) -> int:
        """Tensors with as many values and the shape of an adapted weight that one forward and backward make."""
        adapted = {tuple(module.weight.shape) for module in self.model.modules() if "delta" in module._modules}
        adapted |= {shape[::-1] for shape in adapted}
        found: list[Any] = []
        with Sizes(lambda function, value: found.append(function) if tuple(value.shape) in adapted else None):
            self.backward()
        self.model.zero_grad(set_to_none=True)
        return len(found)


def main() -> None:
    """Measure and write the result with its conditions."""
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, usual in (("rounds", 7), ("rows", 2), ("length", 256), ("rank", 8), ("layers", 30)):
        reader.add_argument(f"--{name}", type=int, default=usual)
    asked = reader.parse_args()
    ids = torch.randint(0, SHAPES["vocab_size"], (asked.rows, asked.length))  # type: ignore[call-overload]
    sides = {
        name: Steps(model(asked.layers, *method), ids)
        for name, *method in (
            ("lora", tt.LoRA(rank=asked.rank)),
            ("dora", tt.DoRA(rank=asked.rank)),
            ("lora over nf4", tt.LoRA(rank=asked.rank), tt.NF4(double=True)),
            ("lora without fast pieces", tt.LoRA(rank=asked.rank)),
            ("lora in compiled blocks", tt.LoRA(rank=asked.rank)),
        )
    }
    built = {name: side.weights_built() for name, side in sides.items()}
    ways = {"lora without fast pieces": nullcontext, "lora in compiled blocks": compiled}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with ExitStack() as stack:
        for name, side in sides.items():
            stack.enter_context(ways.get(name, faster)(side.model))
            side()
        for turn in range(asked.rounds):
            for name in list(sides) if turn % 2 else list(reversed(sides)):
                seconds[name].append(sides[name]())
    ratios = {
        name: [one / lora for one, lora in zip(taken, seconds["lora"], strict=True)]
        for name, taken in seconds.items()
        if name != "lora"
    }
    result = {
        "seconds_per_step": {name: statistics.median(taken) for name, taken in seconds.items()},
        "ratio": {name: statistics.median(values) for name, values in ratios.items()},
        "ratios": ratios,
        "bits_per_weight": {name: found for name, side in sides.items() if (found := bits(side.model)) is not None},
        "weights_built_in_a_step": built,
        "conditions": {
            "shapes": {**SHAPES, "num_hidden_layers": asked.layers},
            "tokens_per_step": asked.rows * asked.length,
            "rank": asked.rank,
            "rounds": asked.rounds,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
