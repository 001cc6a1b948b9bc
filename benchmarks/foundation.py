"""The two quality figures of the README, from the command line as a user would run them.

    python benchmarks/foundation.py --data DIR [--only e2e|sst2] [--seeds 0 1 2]

DIR holds `e2e/trainset.csv.gz` (E2E NLG) and `glue/SST-2/{train,dev}.tsv`. Writes `benchmarks/results/foundation.json`:
held-out loss before and after on E2E with two runs of one seed compared byte for byte, and dev accuracy on SST-2.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results" / "foundation.json"


def tune(*arguments: str) -> dict[str, Any]:
    """One `trimtab tune --json` and what it printed."""
    command = [sys.executable, "-m", "trimtab", "tune", "--json", "--dtype", "float32", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout)


def digest(directory: str) -> str:
    """sha256 of a run's adapter."""
    return hashlib.sha256((Path(directory) / "adapter" / "adapter.safetensors").read_bytes()).hexdigest()


def e2e(data: Path, folder: Path) -> dict[str, Any]:
    """LoRA rank 8 on all linears of SmolLM2-135M-Instruct: 600 rows of E2E, one epoch, twice with one seed."""
    runs = []
    for attempt in ("first", "second"):
        result = tune(
            *("--model", "smollm2-135m-instruct", "--data", str(data / "e2e" / "trainset.csv.gz")),
            *("--columns", "prompt=mr,completion=ref", "--method", "lora", "--rank", "8", "--where", "all-linear"),
            *("--limit", "600", "--heldout", "200", "--seed", "0", "--output", str(folder / f"e2e-{attempt}")),
        )
        runs.append((result, digest(result["directory"])))
    (first, one), (_, two) = runs
    before, after = first["before"]["loss"], first["after"]["loss"]
    return {
        "heldout_loss_before": before,
        "heldout_loss_after": after,
        "fall": 1 - after / before,
        "same_bytes_twice": one == two,
        "sha256": one,
        "rows_per_second": first["rows_per_second"],
        "peak_memory_bytes": first["peak_memory_bytes"],
    }


def sst2(data: Path, folder: Path, seed: int) -> dict[str, Any]:
    """LoRA on q and v of MiniLM-L6: 4,000 rows of SST-2, one epoch, default learning rate."""
    result = tune(
        *("--model", "minilm-l6", "--data", str(data / "glue" / "SST-2" / "train.tsv"), "--limit", "4000"),
        *("--heldout", str(data / "glue" / "SST-2" / "dev.tsv"), "--method", "lora", "--where", "q, v"),
        *("--batch-size", "32", "--seed", str(seed), "--output", str(folder / f"sst2-{seed}")),
    )
    return {
        "seed": seed,
        "dev_accuracy": result["after"]["accuracy"],
        "rows_per_second": result["rows_per_second"],
        "peak_memory_bytes": result["peak_memory_bytes"],
    }


def main() -> None:
    """Run what was asked for and write the results with their conditions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", choices=("e2e", "sst2"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    asked = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    found["conditions"] = {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "note": "SmolLM2 is dequantized from Q4_1, not the original",
    }
    with tempfile.TemporaryDirectory() as folder:
        if asked.only != "sst2":
            found["e2e"] = e2e(asked.data, Path(folder))
        if asked.only != "e2e":
            found["sst2"] = [sst2(asked.data, Path(folder), seed) for seed in asked.seeds]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
