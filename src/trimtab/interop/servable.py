"""What other programs can serve of an adapter: one table of programs, each with what it does not take.

Facts of 2026: vLLM refuses DoRA, biases, whole modules and a rank above its --max-lora-rank, reads one rank and one
alpha for all modules and passes over stacked experts; llama.cpp and Ollama take plain LoRA only, as GGUF.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

LARGEST = 512
"""The largest rank that vLLM can be started with."""


@dataclass(frozen=True)
class Verdict:
    """Whether a program takes an adapter, why not, and how to start it."""

    program: str
    accepts: bool
    reasons: tuple[str, ...]
    how: str


Facts = Mapping[str, Any]
Check = tuple[Callable[[Facts], bool], str]

LORA: Check = (lambda it: it["type"] != "LORA", "it is no LoRA ({type}): trimtab convert --to lora")
PLAIN: tuple[Check, ...] = (
    LORA,
    (lambda it: it["dora"], "DoRA's magnitudes are not read: trimtab convert --to lora"),
    (lambda it: it["biases"], "it trains biases"),
    (lambda it: it["modules"], "it holds whole modules ({modules}): merge it instead"),
    (lambda it: it["tokens"], "it trains single tokens: merge it instead"),
)
ONE_SCALE: Check = (
    lambda it: it["patterns"],
    "ranks or alphas differ by module and one of each is read: trimtab convert --to lora makes them one",
)
PROGRAMS: tuple[tuple[str, tuple[Check, ...], str], ...] = (
    (
        "vLLM",
        (
            *PLAIN,
            ONE_SCALE,
            (lambda it: it["experts"], "LoRA on stacked experts is passed over without a word"),
            (lambda it: it["rank"] > LARGEST, f"its rank {{rank}} is above {LARGEST}"),
            (lambda it: it["embeddings"], "LoRA on embeddings is not taken by every model"),
        ),
        "vllm serve BASE --enable-lora --max-lora-rank {fitting} --lora-modules NAME=DIR",
    ),
    (
        "llama.cpp",
        (*PLAIN, (lambda it: it["experts"], "stacked experts have no LoRA tensors there")),
        "trimtab convert ADAPTER --to gguf --out FILE.gguf; llama-server -m BASE.gguf --lora FILE.gguf",
    ),
    (
        "Ollama",
        (*PLAIN, (lambda it: it["experts"], "stacked experts have no LoRA tensors there")),
        "trimtab convert ADAPTER --to gguf --out FILE.gguf; a Modelfile with FROM BASE and ADAPTER FILE.gguf",
    ),
    ("PEFT", (), "peft.PeftModel.from_pretrained(base, DIR)"),
)
"""Program, what it does not take, and how it is started with what it takes."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM knows for --max-lora-rank."""


def facts_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the checks ask, of an adapter in PEFT's format."""
    names = list(tensors)
    ranks = [int(config.get("r") or 0), *(config.get("rank_pattern") or {}).values()]
    return {
        "type": config["peft_type"],
        "dora": bool(config.get("use_dora")),
        "biases": bool(config.get("lora_bias")) or config.get("bias", "none") != "none",
        "modules": ", ".join(config.get("modules_to_save") or []),
        "tokens": any("trainable_tokens" in name for name in names),
        "patterns": bool(config.get("rank_pattern") or config.get("alpha_pattern")),
        "experts": bool(config.get("target_parameters")),
        "embeddings": any("lora_embedding" in name for name in names),
        "rank": max(ranks),
        "fitting": next((one for one in RANKS if one >= max(ranks)), LARGEST),
    }


def verdicts(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[Verdict]:
    """What each program says to an adapter in PEFT's format."""
    facts = facts_of(config, tensors)
    found = []
    for program, checks, how in PROGRAMS:
        reasons = tuple(why.format(**facts) for wrong, why in checks if wrong(facts))
        found.append(Verdict(program, not reasons, reasons, how.format(**facts)))
    return found
