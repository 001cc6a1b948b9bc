"""Our training step against TRL's SFTTrainer with PEFT: same rows in the same order, same start, optimizer, precision.

    python benchmarks/vs_trl.py --data DIR [--task e2e|alpaca] [--steps 12] [--rounds 3] [--plain]
        [--checkpointing [POLICY]] [--dtype float32|bfloat16] [--avx2] [--quantize affine]

DIR holds `e2e/trainset.csv.gz` and `instruct/alpaca_part.json`. Each side runs in processes of its own, alternately,
`--rounds` times; the first two steps warm up and are not timed. Both sides start from one LoRA (rank 8, all linears,
drawn by us and copied into PEFT) and see the same batches, so their losses must agree. TRL gets the settings that ran
fastest here: torch's own attention, no padding beyond the longest row of a batch, fused AdamW. Neither side reads more
of the data set than the rows it may train on. `--checkpointing` is TRL's of every block, and ours too unless it names
another policy. `--plain` times our loop on packs that share no beginnings too. `--avx2` keeps torch, oneDNN and MKL of
both sides to AVX2 where the machine has more. `--quantize affine` keeps our frozen linear weights in four bits, as the
starter's own file does (their values stay, but for rounding in fp32); TRL's stay dense. The largest batch of a run sets
its peak, so memory wants more steps than speed.
Writes `benchmarks/results/vs_trl-<task>[-checkpointing[-POLICY]][-bfloat16][-avx2][-affine].json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
WARM = 2
SPARE = 64
"""Rows of the file beyond those that are trained on, for the held-out ones and those that are too long."""
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"}
RECIPES: dict[str, dict[str, Any]] = {
    "e2e": {"data": "e2e/trainset.csv.gz", "columns": {"prompt": "mr", "completion": "ref"}},
    "alpaca": {"data": "instruct/alpaca_part.json"},
}


def job_of(asked: argparse.Namespace, packing: str = "auto") -> Any:
    """Our job: model, rows and method, ready to train."""
    from trimtab.train.prepare import prepare
    from trimtab.train.recipe import recipe_from
    from trimtab.train.reporter import Reporter

    recipe = recipe_from(
        {
            **RECIPES[asked.task],
            "data": str(asked.folder / "some.jsonl"),
            "model": "smollm2-135m-instruct",
            "method": "lora",
            "rank": 8,
            "where": "all-linear",
            "limit": asked.limit,
            "heldout": "8",
            "batch_size": 8,
            "steps": asked.steps,
            "learning_rate": 1e-3,
            "warmup": 0,
            "max_length": 1024,
            "truncation": "drop",
            "checkpointing": asked.checkpointing or "off",
            "dtype": asked.dtype,
            "quantize": asked.quantize,
            "packing": packing,
            "output": str(asked.folder / f"run-{os.getpid()}"),
        }
    )
    job = prepare(recipe, Reporter())
    job.directory.mkdir(parents=True, exist_ok=True)
    return replace(job, steps=asked.steps)


def cut(asked: argparse.Namespace) -> None:
    """Write a file of some rows of the data set, drawn at random, a few more than are trained on."""
    from trimtab.data.reading import read

    source = RECIPES[asked.task]["data"]
    table = read(str(asked.data / source)).rows
    some = random.Random(0).sample(range(len(table)), min(len(table), asked.limit + SPARE))
    lines = (json.dumps(table[at]) + "\n" for at in some)
    (asked.folder / "some.jsonl").write_text("".join(lines), encoding="utf-8")


def peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def order_of(job: Any, steps: int) -> list[list[int]]:
    """The rows of each step."""
    from trimtab.data.batches import batches

    size, found, epoch = job.recipe.batch_size, [], 0
    while len(found) < steps:
        found += batches(job.train_rows, size, job.recipe.seed, epoch, by_length=job.packing == "off")
        epoch += 1
    return found[:steps]


def ours(asked: argparse.Namespace, packing: str = "auto") -> dict[str, Any]:
    """Time our loop."""
    from trimtab.engine.remembered import few_shapes_remembered

    few_shapes_remembered()  # as the command line does, before torch is loaded
    from trimtab.train.reporter import Reporter
    from trimtab.train.run import train

    class Clock(Reporter):
        times: list[float] = []  # noqa: RUF012

        def step(self, line: dict[str, Any]) -> None:
            self.times.append(time.perf_counter())

    job, clock = job_of(asked, packing), Clock()
    loaded = peak()
    with job.running():
        lines = train(job, clock)
    return {"times": clock.times, "losses": [line["loss"] for line in lines], "peak": peak(), "loaded": loaded}


def plain(asked: argparse.Namespace) -> dict[str, Any]:
    """Time our loop on packs in which nothing is shared."""
    return ours(asked, "plain")


def rows(asked: argparse.Namespace) -> None:
    """Write what TRL needs to train on the same: rows in order and the LoRA both start from."""
    from safetensors.torch import save_file

    job = job_of(asked)
    order = order_of(job, asked.steps)
    with open(asked.folder / "rows.jsonl", "w", encoding="utf-8") as out:
        for index in (index for step in order for index in step):
            row = job.train_rows[index]
            labels = [token if used else -100 for token, used in zip(row.ids, row.trained, strict=True)]
            out.write(json.dumps({"input_ids": list(row.ids), "labels": labels}) + "\n")
    start = {}
    for name, module in job.model.named_modules():
        if "delta" in module._modules:
            delta = next(iter(module.delta.values()))
            start[f"{name}.A"], start[f"{name}.B"] = delta.A.detach().clone(), delta.B.detach().clone()
    save_file(start, str(asked.folder / "start.safetensors"))
    tokens = [sum(len(job.train_rows[index].ids) for index in step) for step in order]
    packed = [int(job.batch(step).ids.numel()) if job.packing != "off" else tokens[0] for step in order]
    about = {
        "directory": job.record["model"]["directory"],
        "packing": job.packing,
        "tokens": tokens,
        "computed": packed,
    }
    (asked.folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


def trl(asked: argparse.Namespace) -> dict[str, Any]:
    """Time SFTTrainer on the rows written before."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        times: list[float] = []  # noqa: RUF012

        def on_step_end(self, *unused: Any, **unused_too: Any) -> None:
            self.times.append(time.perf_counter())

    directory = json.loads((asked.folder / "about.json").read_text())["directory"]
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, asked.dtype), attn_implementation="sdpa"
    )
    lines = [json.loads(line) for line in (asked.folder / "rows.jsonl").read_text().splitlines()]
    settings = SFTConfig(
        output_dir=str(asked.folder / f"trl-{os.getpid()}"),
        per_device_train_batch_size=8,
        max_steps=asked.steps,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        warmup_steps=0,
        max_grad_norm=1.0,
        weight_decay=0.0,
        train_sampling_strategy="sequential",
        gradient_checkpointing=bool(asked.checkpointing),
        gradient_checkpointing_kwargs={"use_reentrant": False} if asked.checkpointing else None,
        loss_type=asked.loss_type,
        max_length=None,
        bf16=asked.dtype == "bfloat16",
        use_cpu=True,
        optim="adamw_torch_fused",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        dataloader_num_workers=0,
        disable_tqdm=True,
        seed=0,
    )
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    clock = Clock()
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(lines),
        peft_config=lora,
        processing_class=AutoTokenizer.from_pretrained(directory),
        callbacks=[clock],
    )
    start = load_file(str(asked.folder / "start.safetensors"))
    with torch.no_grad():
        for name, module in trainer.model.base_model.model.named_modules():
            if f"{name}.A" in start:
                module.lora_A["default"].weight.copy_(start.pop(f"{name}.A"))
                module.lora_B["default"].weight.copy_(start.pop(f"{name}.B"))
    assert not start, f"PEFT has no LoRA at {list(start)[:3]}"
    loaded = peak()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"times": clock.times, "losses": losses, "peak": peak(), "loaded": loaded}


def side(asked: argparse.Namespace, name: str) -> dict[str, Any]:
    """One run of one side in a process of its own."""
    arguments = [*sys.argv[1:], "--side", name, "--folder", str(asked.folder)]
    environment = os.environ | (AVX2 if asked.avx2 else {})
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1]) if name != "rows" else {}


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--data", type=Path, required=True)
    reader.add_argument("--task", choices=list(RECIPES), default="e2e")
    reader.add_argument("--steps", type=int, default=12)
    reader.add_argument("--rounds", type=int, default=3)
    reader.add_argument("--limit", type=int, default=800)
    reader.add_argument("--checkpointing", nargs="?", const="block", choices=("block", "sqrt", "selective", "offload"))
    reader.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    reader.add_argument("--avx2", action="store_true")
    reader.add_argument("--quantize", help="how we keep the frozen linear weights")
    reader.add_argument("--loss-type", default="nll", help="TRL's")
    reader.add_argument("--plain", action="store_true", help="time our loop without sharing beginnings too")
    reader.add_argument("--side", choices=("ours", "plain", "trl", "rows"), help=argparse.SUPPRESS)
    reader.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = reader.parse_args()
    if asked.side:
        print(json.dumps({"ours": ours, "plain": plain, "trl": trl, "rows": rows}[asked.side](asked)))
        return
    import peft
    import torch
    import transformers
    import trl as peer

    with tempfile.TemporaryDirectory() as folder:
        asked.folder = Path(folder)
        cut(asked)
        side(asked, "rows")
        about = json.loads((asked.folder / "about.json").read_text())
        sides = ("ours", "plain", "trl") if asked.plain else ("ours", "trl")
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for _ in range(asked.rounds):
            for name in sides:
                found[name].append(side(asked, name))
    timed = 8 * (asked.steps - WARM)
    speed = {name: [timed / (run["times"][-1] - run["times"][WARM - 1]) for run in found[name]] for name in found}
    ratios = [one / other for one, other in zip(speed["ours"], speed["trl"], strict=True)]
    shared = [one / other for one, other in zip(speed["ours"], speed["plain"], strict=True)] if asked.plain else []
    apart = max(abs(a - b) for a, b in zip(found["ours"][0]["losses"], found["trl"][0]["losses"], strict=True))
    memory = {name: statistics.median(run["peak"] for run in found[name]) for name in found}
    result = {
        "task": asked.task,
        "checkpointing": asked.checkpointing or False,
        "steps": asked.steps,
        "rounds": asked.rounds,
        "rows_per_second": {name: statistics.median(values) for name, values in speed.items()},
        "rows_per_second_runs": speed,
        "speed_ratio": statistics.median(ratios),
        "speed_ratio_runs": ratios,
        **({"over_plain_packing": statistics.median(shared), "over_plain_packing_runs": shared} if shared else {}),
        "peak_bytes": memory,
        "peak_ratio": memory["ours"] / memory["trl"],
        "largest_loss_difference": apart,
        "losses": {name: found[name][0]["losses"] for name in found},
        "packing": about["packing"],
        "tokens_of_rows": sum(about["tokens"]),
        "tokens_computed_by_us": sum(about["computed"]),
        "conditions": {
            "threads": torch.get_num_threads(),
            "cpu": "AVX2" if asked.avx2 else torch.backends.cpu.get_cpu_capability(),
            "precision": asked.dtype,
            "our_frozen_weights": asked.quantize or "dense",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": peer.__version__,
            "peft": peft.__version__,
            "trl_loss_type": asked.loss_type,
        },
    }
    RESULTS.mkdir(exist_ok=True)
    kind = ("" if asked.dtype == "float32" else f"-{asked.dtype}") + ("-avx2" if asked.avx2 else "")
    kind += f"-{asked.quantize}" if asked.quantize else ""
    again = {None: "", "block": "-checkpointing"}.get(asked.checkpointing, f"-checkpointing-{asked.checkpointing}")
    name = f"vs_trl-{asked.task}{again}{kind}.json"
    (RESULTS / name).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "losses"}, indent=2))


if __name__ == "__main__":
    main()
