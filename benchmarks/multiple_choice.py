"""OpenBookQA by log-likelihood: the question computed once against every choice computed whole with its question.

    python benchmarks/multiple_choice.py --data DIR [--questions 200]

DIR holds `llm_adapters/openbookqa/test.json`. SmolLM2-135M-Instruct in float32; both ways take turns, ten questions
at a time, the order changing each time, after a warm-up. Writes `benchmarks/results/multiple_choice.json`: the largest
difference of a choice's log-likelihood, the choices on which the ways disagree, and the ratio of times, over all
questions and as the median over turns.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from trimtab import __version__
from trimtab.evaluate.choices import Choice, accuracies, questions, score
from trimtab.evaluate.timing import interval
from trimtab.models.loading import load

RESULTS = Path(__file__).parent / "results"
GROUP = 10
"""Questions of a turn."""


def measured(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Both ways over all questions."""
    loaded = load("smollm2-135m-instruct", dtype="float32", device="cpu")
    asked = questions(rows)
    times: dict[bool, list[float]] = {True: [], False: []}
    found: dict[bool, list[Choice]] = {True: [], False: []}
    parts = [asked[:GROUP], *(asked[at : at + GROUP] for at in range(0, len(asked), GROUP))]
    for number, part in enumerate(parts):
        for shared in (True, False) if number % 2 else (False, True):
            started = time.perf_counter()
            scored = score(loaded.model, loaded.tokenizer, part, shared=shared)
            if number:
                times[shared].append(time.perf_counter() - started)
                found[shared] += scored
    pairs = list(zip(found[True], found[False], strict=True))
    apart = [abs(a - b) for one, other in pairs for a, b in zip(one.scores, other.scores, strict=True)]
    ratios = [plain / shared for shared, plain in zip(times[True], times[False], strict=True)]
    return {
        "questions": len(asked),
        "choices": len(apart),
        "largest_difference_of_log_likelihood": max(apart),
        "largest_log_likelihood": max(abs(score) for one in found[False] for score in one.scores),
        "questions_answered_otherwise": sum(one.taken() != other.taken() for one, other in pairs),
        "seconds": {"shared": sum(times[True]), "plain": sum(times[False])},
        "speed_ratio": sum(times[False]) / sum(times[True]),
        "speed_ratio_median": statistics.median(ratios),
        "speed_ratio_interval": interval(ratios),
        "accuracy": accuracies(found[True]),
    }


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--data", type=Path, required=True)
    reader.add_argument("--questions", type=int, default=200)
    asked = reader.parse_args()
    source = asked.data / "llm_adapters" / "openbookqa" / "test.json"
    rows = json.loads(source.read_text(encoding="utf-8"))[: asked.questions]
    document = measured(rows) | {
        "model": "smollm2-135m-instruct",
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": f"{platform.machine()}, {platform.system()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "trimtab": __version__},
    }
    text = json.dumps(document, indent=1)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "multiple_choice.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
