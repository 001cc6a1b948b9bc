"""Every method over 20 steps, other heads and other ways of checkpointing in two gloo processes: as in one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.conftest import WORDS, save_model, write_rows
from tests.train.processes import Asked, apart, settings_of, together

from trimtab import laws
from trimtab.core.errors import UserError
from trimtab.train.recipe import recipe_from
from trimtab.train.run import tune

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo"),
    pytest.mark.slow,
]
STEPS = {"steps": 20, "learning_rate": 1e-3, "batch_size": 8, "heldout": "5", "device": "cpu", "dtype": "float32"}
STEPS |= {"save_every": 0}
BOUND = 1e-5
UPDATES: dict[str, dict[str, Any]] = {
    "causal": {},
    "classify": {"steps": 5, "optimizer": "sgd", "learning_rate": 0.1},
}
"""AdamW, and where some gradients are as small as rounding (an encoder ends its sublayers in norms), what AdamW would
make a step of, plain descent."""
ROUNDED = ("lsq", "qat")
"""A last bit of a weight that lies between two codes turns the code, so only one step can be compared."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Kind of head -> the recipe keys of a tiny model of that kind and its rows."""
    folder = tmp_path_factory.mktemp("heads")
    texts = [f"{one} {two}" for one in WORDS[:6] for two in WORDS[6:12]]
    said = [
        {"prompt": f"say {text}", "completion": " ".join(text.split()[::-1] * (1 + at % 3))}
        for at, text in enumerate(texts)
    ]
    labelled = [{"text": text * (1 + at % 3), "label": "ab"[at % 2]} for at, text in enumerate(texts)]
    valued = [{"text": text * (1 + at % 3), "label": at / 7} for at, text in enumerate(texts)]
    kinds = {
        "causal": ("llama", said, True),
        "classify": ("bert", labelled, False),
        "regress": ("bert", valued, False),
        "seq2seq": ("t5", said, False),
    }
    found = {}
    for kind, (architecture, rows, chat) in kinds.items():
        model = save_model(folder / f"{kind}-model", chat=chat, architecture=architecture)
        without_dropout(model / "config.json")
        data = write_rows(folder / f"{kind}.jsonl", rows)
        found[kind] = {**STEPS, "model": str(model), "data": str(data), "task": kind}
    return found


def without_dropout(path: Path) -> None:
    """Two processes draw other numbers than one."""
    values = json.loads(path.read_text())
    path.write_text(json.dumps({key: 0.0 if "dropout" in key else value for key, value in values.items()}))


def compare(runs: dict[str, dict[str, Any]], folder: Path) -> set[str]:
    """Run everything in one process, in two, and in two with the base spread; the names of what was refused."""
    jobs = {}
    for name, values in runs.items():
        try:
            tune(replace(recipe_from(values), output=str(folder / "alone" / name)))
        except UserError:
            continue  # not for this model
        jobs[f"{name} whole"] = Asked(values)
        jobs[f"{name} spread"] = Asked({**values, "shard": "full"})
    told = together(jobs, folder)
    refused = {name for name, words in told.items() if words != ["done", "done"]}
    for name in refused:
        assert "recipe: several processes" in told[name][0] or "recipe: shard" in told[name][0], (name, told[name])
    done = [name for name in told if name not in refused]
    far = {name: apart(folder / name, folder / "alone" / name.rpartition(" ")[0]) for name in done}
    worse = {name: one for name, one in far.items() if not one <= BOUND}
    assert not worse, worse
    assert len(done) > len(runs)
    return refused


def test_other_heads_and_ways_of_checkpointing_train_as_in_one_process(
    models: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    ways: dict[str, dict[str, Any]] = {
        "lora": {"method": "lora"},
        "padded": {"method": "lora", "packing": "off", "accumulation": 2},
        "pfeiffer": {"method": "pfeiffer", "checkpointing": "block"},
        "nf4": {"method": "lora", "quantize": "nf4", "settings": {"rank": 2}},
    }
    heads = ("classify", "regress", "seq2seq")
    runs = {f"{kind} {way}": {**models[kind], **ways[way]} for kind in heads for way in ways}
    for policy in ("sqrt", "selective", "offload"):
        for way in ("lora", "nf4"):
            runs[f"{policy} {way}"] = {**models["causal"], **ways[way], "checkpointing": policy}
        runs[f"{policy} prompt"] = {**models["causal"], "method": "prompt_tuning", "checkpointing": policy}
    assert compare(runs, tmp_path) == set()


@pytest.mark.parametrize("kind", ["causal", "classify"])
def test_every_method_ends_where_one_process_does(kind: str, models: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    runs: dict[str, dict[str, Any]] = {}
    names = [name for name in laws.registered() if name not in ROUNDED]
    for name in names if kind == "causal" else names[::4]:
        method = laws.registered()[name]
        runs[name] = {**models[kind], **UPDATES[kind], "method": name, "settings": settings_of(method)}
    refused = compare(runs, tmp_path)
    assert {name for name in refused if name.endswith("whole")} <= {"auto_prompt whole", "lora_drop whole"}
