"""Whether a merged model answers as its adapter does: greedy answers to real prompts, and the memory of merging.

    python benchmarks/merge_agreement.py RUN [--prompts 200] [--tokens 32]

RUN is a finished run. Its model with the adapter and the merged model, loaded by plain transformers, answer the same
prompts greedily, one at a time. Then the model is merged once more file by file, from a copy of its checkpoint in files
of 64 MB, in a process of its own. Writes `benchmarks/results/merge_agreement.json`: how many answers are the same, how
many of their tokens, and the peak memory of the merge against the largest file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from trimtab.cli.main import main as trimtab
from trimtab.data.forms import detect, examples
from trimtab.data.reading import read
from trimtab.data.wording import inference_prompt
from trimtab.interop import shards
from trimtab.interop.opening import opened

RESULTS = Path(__file__).parent / "results" / "merge_agreement.json"
MEASURE = """
import json, pathlib, sys, threading, torch, transformers
from trimtab.interop import shards
from trimtab.interop.saved import open_saved
source, adapter, target = map(pathlib.Path, sys.argv[1:])
config = transformers.AutoConfig.from_pretrained(source)
with torch.device("meta"):
    plan = transformers.AutoModelForCausalLM.from_config(config)
saved = open_saved(adapter)
def anonymous():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
before, seen, done = anonymous(), [], threading.Event()
def watch():
    while not done.wait(0.001):
        seen.append(anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
changed = shards.merge_shards(plan, saved, source, target)
done.set()
watcher.join()
print(json.dumps({"before": before, "more": max(seen) - before, "changed": changed}))
"""


def answers(model: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Greedy answers, one prompt at a time."""
    found = []
    with torch.no_grad():
        for ids in prompts:
            given = torch.tensor([ids])
            out = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, do_sample=False)
            found.append(out[0, len(ids) :].tolist())
    return found


def prompts_of(run: Any, tokenizer: Any, count: int) -> list[list[int]]:
    """The prompts of the first rows of the run's data."""
    table = read(run.recipe.data)
    rows = examples(table, detect(table, run.recipe.columns or None))[:count]
    return [inference_prompt(row, tokenizer)[:256] for row in rows]


def memory(source: Path, adapter: Path, folder: Path) -> dict[str, Any]:
    """Peak memory of merging a checkpoint in files of 64 MB, beyond what the process had before."""
    base, out = folder / "base", folder / "streamed"
    transformers.AutoModelForCausalLM.from_pretrained(source).save_pretrained(base, max_shard_size="64MB")
    out.mkdir()
    command = [sys.executable, "-c", MEASURE, str(base), str(adapter), str(out)]
    done = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    largest = max(path.stat().st_size for path in shards.files_of(base))
    return done | {"files": len(shards.files_of(base)), "largest_file": largest, "ratio": done["more"] / largest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=32)
    given = parser.parse_args()
    it = opened(given.run, None, "cpu")
    assert it.run is not None
    prompts = prompts_of(it.run, it.tokenizer, given.prompts)
    before = answers(it.model, prompts, given.tokens)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        assert trimtab(["merge", str(given.run), "--out", str(folder / "merged"), "--device", "cpu"]) == 0
        again = transformers.AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
        after = answers(again, prompts, given.tokens)
        assert it.directory is not None
        used = memory(it.directory, given.run / "adapter", folder)
    same = sum(one == other for one, other in zip(before, after, strict=True))
    pairs = [(a, b) for one, other in zip(before, after, strict=True) for a, b in zip(one, other, strict=False)]
    result = {
        "run": {
            "model": it.run.recipe.model,
            "method": it.run.record["method"],
            "data": Path(it.run.recipe.data).name,
            "steps": it.run.record["steps"],
            "learning_rate": it.run.record["learning_rate"],
        },
        "dtype": str(next(again.parameters()).dtype),
        "prompts": len(prompts),
        "same_answers": same,
        "same_tokens": sum(a == b for a, b in pairs) / len(pairs),
        "merge_memory": used,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
