"""Perplexity of frozen weights in few bits: dense, rounded, GPTQ and SVDQuant; then what tuning on top gives.

    python benchmarks/quantized.py --data DIR [--part wikitext|tuned] [--bits 4 3] [--groups 64 0]

DIR holds `wikitext2/` (wiki.test.raw, part_train_1MB.txt or wiki.train.raw) and `ptb/` (ptb.train.txt, ptb.test.txt).

`wikitext`: SmolLM2-135M-Instruct on the first `--eval-tokens` of WikiText-2 test, in windows of `--length` tokens that
do not overlap, each predicted from its own beginning; the linear layers of the blocks in codes of `--bits`, in groups
of `--groups` inputs (0: one group per output). GPTQ and the smoothing of SVDQuant, whose rest is rounded to the same
codes, are calibrated on `--calibration` windows of the training text.

`tuned`: the same model tuned on PTB for `--steps` steps and measured on PTB test: PEQA, LoRA over rounded weights,
LoRA over GPTQ, and quantization-aware training (LSQ), one group per output, beside the figures published for PEQA. The
learning rate of each is that of the lowest perplexity on `--choosing` windows split off the training text, after a
third of the steps, among a quarter, once and four times a usual one and up to two further ones beyond the outermost.

Every row is written to `benchmarks/results/quantized.json` when it is done; rows that are there with the same settings
are not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import trimtab as tt
from perp import perplexity, retrain, windows
from trimtab.models.loading import load

RESULTS = Path(__file__).parent / "results" / "quantized.json"
MODEL = "smollm2-135m-instruct"
PUBLISHED = {
    "source": "PEQA, arXiv 2305.14152: perplexity on WikiText-2 after tuning; LLaMA 7B",
    "QAT": {"4": 5.76, "3": 6.14},
    "LoRA + OPTQ": {"4": 7.13, "3": 19.47},
    "PEQA": {"4": 5.84, "3": 6.19},
}
RATES = {"peqa": 1e-3, "lora over rounded": 1e-3, "lora over gptq": 1e-3, "qat": 1e-4}
FACTORS, BEYOND = (0.25, 1.0, 4.0), {0.25: 1 / 16, 1 / 16: 1 / 64, 4.0: 16.0, 16.0: 64.0}
"""Times those rates, and what is tried next where a factor is the outermost and the best."""


def fresh() -> Any:
    """The dense model and its tokenizer, in fp32."""
    loaded = load(MODEL, dtype="float32", device="cpu")
    loaded.model.requires_grad_(False)
    return loaded.model, loaded.tokenizer


def file_of(folder: Path, *names: str) -> Path:
    return next(path for name in names if (path := folder / name).is_file())


def calibrated(model: Any, format: Any, rows: torch.Tensor) -> None:
    """A format that needs inputs, over windows, with a line per block."""
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in rows.split(2)]
    tt.calibrate(
        model,
        format,
        batches,
        run=lambda model, batch: model.model(**batch, use_cache=False),  # the head's logits are not needed
        progress=lambda done, all: print(f"  block {done} of {all}", time.strftime("%H:%M:%S"), flush=True),
    )


def coded(how: str, bits: int, group: int | None, rows: torch.Tensor) -> tuple[Any, float]:
    """A model in codes, and the seconds that took."""
    model, _ = fresh()
    started = time.perf_counter()
    if how == "rounded":
        tt.quantize(model, tt.Affine(bits, group))
    elif how.startswith("gptq"):
        calibrated(model, tt.GPTQ(bits, group, act_order=how.endswith("ordered")), rows)
    elif how == "svdquant":
        tt.quantize(model, tt.SVDQuant(tt.Affine(bits, group)))
    elif how == "svdquant smoothed":
        calibrated(model, tt.SVDQuant(tt.Affine(bits, group), smooth=True), rows)
    return model, time.perf_counter() - started


def wikitext(asked: argparse.Namespace, results: Results) -> None:
    """Dense weights, and those in few bits."""
    model, tokenizer = fresh()
    folder = asked.data / "wikitext2"
    test = windows(tokenizer, folder / "wiki.test.raw", asked.length, asked.eval_tokens)
    train = windows(tokenizer, file_of(folder, "wiki.train.raw", "part_train_1MB.txt"), asked.length)
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(asked.seed))[: asked.calibration]
    if results.wants("wikitext dense"):
        results.add("wikitext dense", {"perplexity": perplexity(model, test), "bits_per_weight": 32.0})
    del model
    for bits in asked.bits:
        for group in asked.groups:
            for how in ("rounded", "gptq", "gptq ordered", "svdquant", "svdquant smoothed"):
                name = f"wikitext {bits} bits, {f'groups of {group}' if group else 'per output'}, {how}"
                if not results.wants(name):
                    continue
                model, seconds = coded(how, bits, group or None, train[chosen])
                size = stored(model)
                tt.dequantize(model)  # the same numbers, faster
                results.add(name, {"perplexity": perplexity(model, test), "bits_per_weight": size, "seconds": seconds})
                del model


def stored(model: Any) -> float:
    """Bits per weight of the coded layers, as stored."""
    codes = [module.code for module in model.modules() if "code" in module._modules]
    return 8 * sum(code.nbytes for code in codes) / sum(code.shape[0] * code.shape[1] for code in codes)


def attached(how: str, bits: int, base: Any) -> Any:
    """A copy of a dense or coded model, ready to be tuned."""
    model = copy.deepcopy(base)
    if how == "qat":
        tt.attach(model, tt.LSQ(code_bits=bits), where="all-linear")
    elif how == "peqa":
        tt.attach(model, tt.PEQA(), where="all-linear")
    else:
        tt.attach(model, tt.LoRA(rank=4), where="q, v")
    return model


def chosen(how: str, bits: int, base: Any, train: Any, apart: Any, asked: argparse.Namespace) -> dict[float, float]:
    """Perplexity on windows apart by learning rate, best first, after a third of the steps."""
    tried: dict[float, float] = {}
    short = argparse.Namespace(**{**vars(asked), "steps": asked.steps // 3})
    following: list[float] = list(FACTORS)
    while following:
        factor = following.pop(0)
        model = attached(how, bits, base)
        retrain(model, train, short, RATES[how] * factor)
        tried[factor] = perplexity(model, apart)
        print(f"  x{factor:g}: {tried[factor]:.3f}", flush=True)
        best = min(tried, key=lambda one: tried[one])
        if not following and best in (min(tried), max(tried)) and len(tried) < len(FACTORS) + 2 and best in BEYOND:
            following = [BEYOND[best]]
    return {RATES[how] * one: tried[one] for one in sorted(tried, key=lambda one: tried[one])}


def tuned(asked: argparse.Namespace, results: Results) -> None:
    """The rows of PEQA's table, tuned and measured on PTB."""
    model, tokenizer = fresh()
    folder = asked.data / "ptb"
    test = windows(tokenizer, folder / "ptb.test.txt", asked.length, asked.eval_tokens)
    every = windows(tokenizer, folder / "ptb.train.txt", asked.length, 400_000)
    train, apart = every[: -asked.choosing], every[-asked.choosing :]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(asked.seed))
    if results.wants("ptb dense, not tuned"):
        results.add("ptb dense, not tuned", {"perplexity": perplexity(model, test)})
    del model
    for bits in asked.bits:
        for how in RATES:
            name = f"ptb {bits} bits, {how}"
            if not results.wants(name):
                continue
            kind = "dense" if how == "qat" else "gptq" if how.endswith("gptq") else "rounded"
            base, _ = coded(kind, bits, None, train[order[: asked.calibration]])
            tried = chosen(how, bits, base, train, apart, asked)
            model, rate = attached(how, bits, base), next(iter(tried))
            before = perplexity(model, test)
            print(f"  before {before:.2f}", flush=True)
            trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            seconds = retrain(model, train, asked, rate)
            if how in ("peqa", "qat"):
                tt.merge(model)
            found = {"before": before, "perplexity": perplexity(model, test), "trained": trained}
            results.add(name, found | {"learning_rate": rate, "rates_tried": tried, "seconds": seconds})
            del model, base


class Results:
    """Rows on disk, each with the conditions it was measured under."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        skipped = ("data", "part", "bits", "groups", *(() if asked.part == "tuned" else ("choosing",)))
        self.settings = {key: value for key, value in vars(asked).items() if key not in skipped}
        self.conditions = self.settings | {
            "model": MODEL,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "note": "fp32; SmolLM2 is dequantized from Q4_1 (affine 4-bit in groups of 32), not the original",
        }

    def wants(self, name: str) -> bool:
        """Whether a row is still to be measured, or was with other settings."""
        known = self.rows.get(name, {}).get("conditions", {})
        wanted = any(known.get(key) != value for key, value in self.settings.items())
        if wanted:
            print(name, flush=True)
        return wanted

    def add(self, name: str, found: dict[str, Any]) -> None:
        """Write a row."""
        print(f"  {found['perplexity']:.3f}", flush=True)
        self.rows[name] = found | {"conditions": self.conditions}
        if name.startswith("ptb"):
            self.rows["published"] = PUBLISHED
        RESULTS.parent.mkdir(exist_ok=True)
        temporary = RESULTS.with_suffix(".partial")
        temporary.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")
        temporary.replace(RESULTS)


def main() -> None:
    """Measure the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--part", choices=("wikitext", "tuned"), default="wikitext")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--groups", type=int, nargs="+", default=[64, 0])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--eval-tokens", type=int, default=16384)
    parser.add_argument("--calibration", type=int, default=32, help="windows that GPTQ is calibrated on")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--choosing", type=int, default=12, help="windows that the learning rate is chosen on")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    {"wikitext": wikitext, "tuned": tuned}[asked.part](asked, Results(asked))


if __name__ == "__main__":
    main()
