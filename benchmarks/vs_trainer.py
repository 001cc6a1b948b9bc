"""Our training step against Hugging Face's Trainer with PEFT: SST-2 on MiniLM-L6, LoRA on q and v, batches of 32.

    python benchmarks/vs_trainer.py --data DIR [--steps 40] [--rounds 3] [--avx2]

DIR holds `glue/SST-2/train.tsv`. Each side runs in processes of its own, alternately, `--rounds` times; the first five
steps warm up and are not timed. Both start from one LoRA and one classifier and see the same batches in the same random
order, without dropout, so their losses must agree. Trainer pads each batch to its longest row; we put the rows end to
end. Trainer at its best is a third side: batches of rows of like length, hardly padded, which changes what a step
trains on. `--avx2` keeps all sides to AVX2 where the machine has more. Writes
`benchmarks/results/vs_trainer-sst2[-avx2].json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from vs_trl import AVX2

RESULTS = Path(__file__).parent / "results"
WARM, BATCH, RATE = 5, 32, 2e-3


def job_of(asked: argparse.Namespace) -> Any:
    """Our job: model, rows and method, ready to train."""
    from trimtab.train.prepare import prepare
    from trimtab.train.recipe import recipe_from
    from trimtab.train.reporter import Reporter

    values = {
        "model": str(copy) if (copy := asked.folder / "model").is_dir() else "minilm-l6",
        "data": str(asked.data / "glue" / "SST-2" / "train.tsv"),
        "method": "lora",
        "rank": 8,
        "where": "q, v",
        "limit": 4000,
        "heldout": "8",
        "batch_size": BATCH,
        "steps": asked.steps,
        "warmup": 0,
        "learning_rate": RATE,
        "dtype": "float32",
        "save_every": 0,
        "output": str(asked.folder / f"run-{os.getpid()}"),
    }
    job = prepare(recipe_from(values), Reporter())
    job.directory.mkdir(parents=True, exist_ok=True)
    return replace(job, steps=asked.steps)


def peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ours(asked: argparse.Namespace) -> dict[str, Any]:
    """Time our loop."""
    from trimtab.engine.remembered import few_shapes_remembered

    few_shapes_remembered()  # as the command line does, before torch is loaded
    from trimtab.train.reporter import Reporter
    from trimtab.train.run import train

    class Clock(Reporter):
        times: list[float] = []  # noqa: RUF012

        def step(self, line: dict[str, Any]) -> None:
            self.times.append(time.perf_counter())

    job, clock = job_of(asked), Clock()
    with job.running():
        lines = train(job, clock)
    return {"times": clock.times, "losses": [line["loss"] for line in lines], "peak": peak()}


def rows(asked: argparse.Namespace) -> None:
    """Write what the peer needs to train on the same: rows in order, and the tensors both start from."""
    from safetensors.torch import save_file

    from trimtab.data.batches import batches

    directory = Path(job_of(asked).record["model"]["directory"])
    shutil.copytree(directory, asked.folder / "model")
    config = json.loads((directory / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (asked.folder / "model" / "config.json").write_text(json.dumps(config))
    job = job_of(asked)
    for name, by_length in (("trainer", False), ("sorted", True)):
        order = batches(job.train_rows, BATCH, job.recipe.seed, 0, by_length=by_length)[: asked.steps]
        with open(asked.folder / f"{name}.jsonl", "w", encoding="utf-8") as out:
            for index in (index for step in order for index in step):
                row = job.train_rows[index]
                out.write(json.dumps({"input_ids": list(row.ids), "labels": int(row.label)}) + "\n")
    start = {}
    for name, module in job.model.named_modules():
        for delta in getattr(module, "delta", {}).values() if "delta" in module._modules else ():
            for key, value in delta.named_parameters():
                start[f"{name}.{key}"] = value.detach().clone()
    start |= {f"base.{k}": v.detach().clone() for k, v in job.model.state_dict().items() if k.startswith("classifier.")}
    save_file(start, str(asked.folder / "start.safetensors"))
    about = {"directory": job.record["model"]["directory"], "class": job.record["model"]["class"]}
    (asked.folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


def trainer(asked: argparse.Namespace) -> dict[str, Any]:
    """Time Trainer on the rows written before."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    class Clock(TrainerCallback):
        times: list[float] = []  # noqa: RUF012

        def on_step_end(self, *unused: Any, **unused_too: Any) -> None:
            self.times.append(time.perf_counter())

    directory = json.loads((asked.folder / "about.json").read_text())["directory"]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    base = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=2, dtype=torch.float32)
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = get_peft_model(base, lora)
    start = load_file(str(asked.folder / "start.safetensors"))
    with torch.no_grad():
        for name, module in model.base_model.model.named_modules():
            if f"{name}.A" in start:
                module.lora_A["default"].weight.copy_(start[f"{name}.A"])
                module.lora_B["default"].weight.copy_(start[f"{name}.B"])
        head = model.base_model.model.classifier.modules_to_save["default"]
        head.weight.copy_(start["base.classifier.weight"])
        head.bias.copy_(start["base.classifier.bias"])
    lines = [json.loads(line) for line in (asked.folder / f"{asked.side}.jsonl").read_text().splitlines()]
    settings = TrainingArguments(
        output_dir=str(asked.folder / f"peer-{os.getpid()}"),
        per_device_train_batch_size=BATCH,
        max_steps=asked.steps,
        learning_rate=RATE,
        lr_scheduler_type="linear",
        warmup_steps=0,
        max_grad_norm=1.0,
        weight_decay=0.0,
        train_sampling_strategy="sequential",
        use_cpu=True,
        optim="adamw_torch_fused",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    )
    clock = Clock()
    loop = Trainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(lines),
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[clock],
    )
    loop.train()
    losses = [entry["loss"] for entry in loop.state.log_history if "loss" in entry]
    return {"times": clock.times, "losses": losses, "peak": peak()}


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
    reader.add_argument("--steps", type=int, default=40)
    reader.add_argument("--rounds", type=int, default=3)
    reader.add_argument("--avx2", action="store_true")
    reader.add_argument("--side", choices=("ours", "trainer", "sorted", "rows"), help=argparse.SUPPRESS)
    reader.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = reader.parse_args()
    if asked.side:
        print(json.dumps({"ours": ours, "trainer": trainer, "sorted": trainer, "rows": rows}[asked.side](asked)))
        return
    import peft
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        asked.folder = Path(folder)
        side(asked, "rows")
        found: dict[str, list[dict[str, Any]]] = {"ours": [], "trainer": [], "sorted": []}
        for _ in range(asked.rounds):
            for name in found:
                found[name].append(side(asked, name))
    timed = BATCH * (asked.steps - WARM)
    speed = {name: [timed / (run["times"][-1] - run["times"][WARM - 1]) for run in found[name]] for name in found}
    ratios = {
        name: [one / other for one, other in zip(speed["ours"], speed[name], strict=True)]
        for name in ("trainer", "sorted")
    }
    memory = {name: statistics.median(run["peak"] for run in found[name]) for name in found}
    losses = {name: found[name][0]["losses"] for name in found}
    result = {
        "steps": asked.steps,
        "rounds": asked.rounds,
        "rows_per_second": {name: statistics.median(values) for name, values in speed.items()},
        "rows_per_second_runs": speed,
        "speed_ratio": statistics.median(ratios["trainer"]),
        "speed_ratio_runs": ratios["trainer"],
        "speed_ratio_to_trainer_by_length": statistics.median(ratios["sorted"]),
        "peak_bytes": memory,
        "peak_ratio": memory["ours"] / memory["trainer"],
        "largest_loss_difference": max(abs(a - b) for a, b in zip(losses["ours"], losses["trainer"], strict=True)),
        "losses": losses,
        "conditions": {
            "threads": torch.get_num_threads(),
            "cpu": "AVX2" if asked.avx2 else torch.backends.cpu.get_cpu_capability(),
            "precision": "float32",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
    }
    RESULTS.mkdir(exist_ok=True)
    name = f"vs_trainer-sst2{'-avx2' if asked.avx2 else ''}.json"
    (RESULTS / name).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "losses"}, indent=2))


if __name__ == "__main__":
    main()
