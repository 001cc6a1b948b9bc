"""Pages of every kind, made of results that were drawn rather than trained: quick, with long names and empty cells."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from trimtab.compare.setup import Entry, Setup
from trimtab.compare.verdict import standings, verdict

NAMES = ("untuned", "lora:rank=16+alpha=32+where=q, v", "houlsby", "ia3", "full", "prefix_tuning:length=100")
SITES = ("q", "v", "down")


def contest(task: str = "causal", names: tuple[str, ...] = NAMES) -> dict[str, Any]:
    """A result as `trimtab.compare` returns it."""
    draw = random.Random(0)
    setup = Setup(model="models/a-model-with-a-rather-long-name", data="rows.jsonl", methods=names)
    entries = [
        Entry(name, {"method": "lora"}, "reference" if name in ("untuned", "full") else "method") for name in names
    ]
    finals: dict[str, list[dict[str, Any]]] = {}
    for place, entry in enumerate(entries):
        for seed in range(3):
            finals.setdefault(entry.name, []).append(run(draw, entry, place, seed))
    table = standings(entries, finals, task)
    for row in table:
        row["edge"] = row["name"] == "ia3"
    return {
        "setup": {"model": setup.model, "data": setup.data, "rates": [0.25, 1, 4], "methods": list(names)},
        "task": task,
        "rows": {"train": 900, "choose": 30, "judge": 60},
        "steps": 100,
        "cost": {"steps": 4200, "naive_steps": 9000, "seconds": 812.0},
        "table": table,
        "verdict": verdict(table, finals, task, 60),
        "skipped": {"boft": "it diverged at every learning rate"},
        "runs": finals,
        "conditions": {"versions": {"torch": "2.13.0"}, "machine": "x86_64, 2 cores", "dtype": "float32"},
    }


def run(draw: random.Random, entry: Entry, place: int, seed: int) -> dict[str, Any]:
    """A final run."""
    level = 2.0 - 0.2 * place + draw.gauss(0, 0.02)
    losses = [max(0.01, draw.gauss(level, 0.4)) for _ in range(60)]
    right = [float(draw.random() < 0.6 + 0.05 * place) for _ in range(60)]
    judge = {"loss": sum(losses) / 60, "losses": losses, "terms": [1] * 60, "right": right, "accuracy": sum(right) / 60}
    found: dict[str, Any] = {"name": entry.name, "kind": entry.kind, "seed": seed, "factor": 1.0, "judge": judge}
    found |= {"settings": {}, "peak_bytes": int(9e8 + 1e8 * place), "reference_loss": 3.1, "forgetting": 0.01 * place}
    if entry.name != "untuned":
        found |= {"seconds": 10.0 + place, "saved_bytes": 10**5 * 4**place, "trainable": 10**4 * 4**place}
        found |= {"rate": 1e-3 / (place + 1), "predicted_bytes": 10**9, "training_peak_bytes": int(9e8 + 9e7 * place)}
        found["curve"] = [(step, 3 * 0.97**step + draw.random() / 5) for step in range(1, 101)]
    found["samples"] = [{"prompt": "What is <b>bold</b>? " + "word " * 40, "wanted": "x" * 90, "answer": "yes\n\nno"}]
    return found


def pages(folder: Path) -> dict[str, Path]:
    """A page of every kind, written by the functions that users' pages are written by."""
    import torch
    from torch import nn

    import trimtab as tt
    from trimtab.interop.analysis import analyse
    from trimtab.plan.scaling import plan_many
    from trimtab.report import ablation, analysis, ratios, scaling
    from trimtab.report import contest as contests
    from trimtab.train.recipe import recipe_from

    found = {"contest": contests.write(contest(), folder / "contest")}
    found["classes"] = contests.write(contest("classify", NAMES[:4]), folder / "classes")

    result = contest(names=("untuned", "q rank 16", "q,v rank 8"))
    points = [{"where": "q", "size": 16, "sites": 30}, {"where": "q, v", "size": 8, "sites": 60}]
    rows = [row for row in result["table"] if row["name"] != "untuned"]
    rows = [
        {
            **row,
            **points["v" in row["name"]],
            "parameters": 73728,
            "difference": result["verdict"]["differences"].get(row["name"]),
        }
        for row in rows
    ]
    told = {"setting": "rank", "budget": 73728, "left_out": {"k": "rank 8 has 9"}, "rows": rows}
    found["ablation"] = ablation.write(result | {"ablation": told}, folder / "ablation.html", folder / "plots")

    result = contest(names=("λ = 1", "λ = 4", "λ = 16"))
    apart = {"mean": -0.1, "low": -0.2, "high": 0.1, "tie": True}
    by_ratio = {1: None, 4: apart, 16: apart | {"tie": False, "high": -0.05}}
    named = {row["name"]: row for row in result["table"]}
    rows = [
        {**named[f"λ = {ratio}"], "ratio": ratio, "rate_A": 1e-3, "rate_B": ratio * 1e-3, "to_one": one}
        for ratio, one in by_ratio.items()
    ]
    points = [
        {
            "ratio": ratio,
            "rate_A": rate,
            "rate_B": ratio * rate,
            "steps": 100,
            "seed": 0,
            "final": True,
            "choose": 1 + rate,
        }
        for ratio in by_ratio
        for rate in (1e-3, 2e-3)
    ]
    told = {"rows": rows, "points": points, "sentences": ["Best in the mean: λ = 4.", "λ = 16: a tie."]}
    found["ratios"] = ratios.write(result | {"ratios": told}, folder / "ratios.html", folder / "plots")

    torch.manual_seed(0)
    analyses = {}
    for name in ("a-run-with-a-long-name", "another"):
        model = nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 24), nn.Linear(24, 8))
        tt.attach(model, tt.LoRA(rank=2), where="0, 1, 2")
        for key, one in model.named_parameters():
            if key.endswith("B"):
                one.data.normal_(std=0.1)
        analyses[name] = analyse(model)
    found["analysis"] = analysis.write(analyses, folder / "analysis.html")

    shape = Path(__file__).parents[2] / "benchmarks" / "shapes" / "gpt2-medium" / "config.json"
    recipe = recipe_from({"model": str(shape), "data": "-", "max_length": 64, "dtype": "float32"})
    many = plan_many(recipe, gpus=4, nodes=2, fit="h100")
    drawn = scaling.scaling_plot(many, folder / "scaling")
    found["scaling"] = scaling.write(many, drawn, folder / "scaling")
    return found
