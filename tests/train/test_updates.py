"""A recipe's optimizer and schedule in the loop: memory, exact resume, refusals, and a default that has not changed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from trimtab.core.errors import UserError
from trimtab.train import checkpoint, updates
from trimtab.train.find_rate import find_rate
from trimtab.train.prepare import prepare, width_of
from trimtab.train.recipe import Recipe, recipe_from
from trimtab.train.reporter import Reporter
from trimtab.train.run import resume, tune
from trimtab.train.rundir import open_run, write_start


@pytest.fixture(scope="module")
def values(model: Path, rows: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"model": str(model), "data": str(rows), "method": "full", "batch_size": 4, "steps": 9}
    return found | {"heldout": "4", "save_every": 1, "device": "cpu", "learning_rate": 0.01, "weight_decay": 0.01}


def adapter(directory: Path) -> bytes:
    return (directory / "adapter" / "adapter.safetensors").read_bytes()


class Crash(Exception):
    pass


class Notes(Reporter):
    text = ""

    def note(self, text: str) -> None:
        self.text += text + "\n"


class At(Reporter):
    def __init__(self, step: int) -> None:
        self.at = step

    def step(self, metrics: Any) -> None:
        if metrics["step"] == self.at:
            raise Crash


POINTS: dict[str, dict[str, Any]] = {
    "transposed": {"where": "embed, all-linear"},  # an embedding's V lies in memory the other way round
    "galore": {"optimizer": {"name": "galore", "rank": 4, "gap": 3}, "accumulation": 2},
    "apollo": {"optimizer": {"apollo": {"rank": 4, "gap": 3}}, "checkpointing": "block", "packing": "off"},
    "adam8": {"optimizer": {"name": "paged", "inner": {"name": "adam8", "smallest": 1}, "smallest": 1}},
    "lomo": {"optimizer": "lomo", "clip": 0.05, "checkpointing": "block"},
    "per-layer": {"optimizer": {"in_backward": {"inner": {"name": "q_galore", "rank": 8, "gap": 2}}}, "clip": 0},
    "in codes": {"method": "full_int8", "optimizer": {"name": "q_galore", "rank": 4, "gap": 2}, "accumulation": 2},
    "in codes, per layer": {"method": "full_int8", "optimizer": {"in_backward": {"inner": "adam8"}}, "clip": 0.05},
    "lora+": {"optimizer": "lora_plus", "method": "lora", "settings": {"dropout": 0.2}},
    "lisa": {"active": {"name": "lisa", "layers": 1, "every": 2}, "where": "all-linear, embed, norm"},
    "several rates": {"method": "mam", "settings": {"length": 2, "bottleneck": 4}},
    "badam": {"active": "badam", "active_every": 3, "optimizer": "adafactor", "checkpointing": "block"},
}


@pytest.mark.parametrize("point", POINTS)
def test_a_run_that_goes_on_ends_with_the_same_bytes(point: str, values: dict[str, Any], tmp_path: Path) -> None:
    recipe = recipe_from({**values, **POINTS[point]})
    whole, broken = (replace(recipe, output=str(tmp_path / name)) for name in ("whole", "broken"))
    result = tune(whole)
    assert result.after["loss"] < result.before["loss"]
    with pytest.raises(Crash):
        tune(broken, At(6))  # for LISA and BAdam a checkpoint at a switch, where states are dropped
    resume(tmp_path / "broken")
    assert adapter(tmp_path / "whole") == adapter(tmp_path / "broken")
    record = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert record["optimizer"]["optim"] == recipe.optimizer


def test_in_backward_is_the_same_run_as_steps_after_it(values: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for name, optimizer in (("after", "lion"), ("within", {"in_backward": {"inner": "lion"}})):
        recipe = recipe_from({**values, "optimizer": optimizer, "clip": 0.05, "output": str(tmp_path / name)})
        tune(replace(recipe, learning_rate=0.001))
        norms = [json.loads(line)["gradient_norm"] for line in (tmp_path / name / "metrics.jsonl").open()]
        found.append((adapter(tmp_path / name), norms))
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
    assert min(found[0][1]) > 0.05, "nothing was clipped"


def test_badam_holds_the_state_of_one_block(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[tuple[int, int]] = []
    plain = checkpoint.snapshot

    def look(model: Any, optimizer: Any, *more: Any) -> Any:
        trained = [p for p in model.parameters() if p.requires_grad]
        held.append((optimizer.state_bytes(), sum(tt.Lion().state_bytes(p.shape) for p in trained)))
        return plain(model, optimizer, *more)

    monkeypatch.setattr(checkpoint, "snapshot", look)
    recipe = recipe_from(
        {**values, "optimizer": "lion", "active": "badam", "active_every": 2, "active_order": "ascending"}
    )
    tune(replace(recipe, output=str(tmp_path / "run")))
    assert all(bytes == formula > 0 for bytes, formula in held)
    assert len(set(held)) == 1


def test_the_default_is_torchs_fused_adamw() -> None:
    made = updates.optimizer_of(Recipe(weight_decay=0.1), torch.nn.Linear(2, 2), 0.01, {})
    assert type(made) is torch.optim.AdamW
    (group,) = made.param_groups
    plain = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters(), lr=0.01, weight_decay=0.1, fused=True)
    assert {key: value for key, value in group.items() if key not in ("params", "param_names", "ratio")} == {
        key: value for key, value in plain.param_groups[0].items() if key != "params"
    }


MIX: dict[str, Any] = {"method": "unipelt", "settings": {"length": 2, "bottleneck": 4, "rank": 2}}


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
@pytest.mark.parametrize("equal", [False, True])
def test_the_parts_of_a_preset_learn_in_the_ratio_of_their_own_rates(
    optimizer: str, equal: bool, values: dict[str, Any], tmp_path: Path
) -> None:
    notes = Notes()
    recipe = recipe_from({**values, **MIX, "optimizer": optimizer, "equal_rates": equal, "learning_rate": 0.008})
    job = prepare(recipe, notes, tmp_path / "run")
    made = updates.Updates(recipe, job.model, job.rate, job.ratios)
    made.begin(0, job.rate / 2)
    told = {name: group["lr"] for group in made.optimizer.param_groups for name in group["param_names"]}
    assert told.keys() == {name for name, p in job.model.named_parameters() if p.requires_grad}
    width = width_of(job.model)
    for name, rate in told.items():
        second, third = "default+1." in name, "default+2." in name or "default/prefix_tuning." in name
        method = tt.PrefixTuning() if third else tt.Pfeiffer() if second else tt.LoRA()
        share = 1.0 if equal else method.rate(width) / tt.LoRA().rate(width)
        assert rate == pytest.approx(0.004 * share), name
    assert (" at stream" in notes.text) != equal
    assert len(set(told.values())) == (1 if equal else 3)


REFUSED = [
    ({"optimizer": "lomo", "accumulation": 2}, "every backward is a step"),
    ({"optimizer": "lomo", "method": "adalora"}, "a penalty is a second backward"),
    ({"active": "lisa", "method": "adalora"}, "the layers whose turn it is not have none"),
    ({"active": "lisa", "where": "embed"}, "nothing to take turns"),
    ({"active": "badam", "where": "all-linear, embed"}, "would never have its turn"),
    ({"optimizer": "lora_plus"}, "all parameters would learn at one rate"),
    ({"optimizer": "galore", "method": "lora"}, "nothing to project"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED)
def test_a_pair_that_cannot_is_refused_before_anything_is_written(
    changes: dict[str, Any], reason: str, values: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=reason):
        tune(recipe_from({**values, **changes, "output": str(tmp_path / "run")}))
    assert not (tmp_path / "run").exists()


def test_the_refusals_are_a_table() -> None:
    lines = updates.markdown().splitlines()
    assert len(lines) == 2 + len(updates.REFUSALS)
    assert all(line.count("|") == 5 for line in lines)


def test_every_way_to_say_it_means_the_same(tmp_path: Path) -> None:
    base = {"model": "m", "data": "d"}
    ways: list[dict[str, Any]] = [
        {"optimizer": {"name": "galore", "rank": 7}},
        {"optimizer": {"galore": {"rank": 7}}},
        {"optim": "galore_adamw", "optimizer-rank": "7"},
        {"optimizer": "galore", "optimizer_settings": {"rank": 7}},
    ]
    made = [recipe_from({**base, **way}) for way in ways]
    assert {updates.rule_of(one) for one in made} == {tt.GaLore(rank=7)}
    write_start(tmp_path, made[1], {})
    import yaml

    assert recipe_from(yaml.safe_load((tmp_path / "recipe.yaml").read_text())) == made[1]
    schedule = updates.schedule_of(recipe_from({**base, "active": "lisa", "active_layers": 3}))
    assert schedule == tt.LISA(layers=3)
    assert updates.schedule_of(recipe_from(base)) is None
    with pytest.raises(UserError, match=r"galore has no setting 'ranks' \(nearest: rank\)"):
        updates.rule_of(recipe_from({**base, "optimizer": {"name": "galore", "ranks": 7}}))
    with pytest.raises(UserError, match="no schedule of what trains named 'lysa'"):
        recipe_from({**base, "active": "lysa"})
    with pytest.raises(UserError, match=r"unknown key 'optimizer_rank'"):
        recipe_from({**base, "optimizer_rank": 7})


def test_the_command_line_has_flags_for_their_settings() -> None:
    from click.testing import CliRunner

    from trimtab.cli import main as program

    text = CliRunner().invoke(program.cli, ["tune", "--optimizer", "galore", "--active", "lisa", "--help"]).output
    assert "Settings of galore" in text
    assert "--optimizer-rank" in text
    assert "--active-layers" in text
    plain = CliRunner().invoke(program.cli, ["tune", "--help"]).output
    assert "--optimizer " in plain
    assert "--optimizer-rank" not in plain


@pytest.mark.parametrize("optimizer", ["adamw", "lomo"])
def test_the_learning_rate_test_uses_the_recipes_optimizer(
    optimizer: str, values: dict[str, Any], tmp_path: Path
) -> None:
    recipe = replace(recipe_from({**values, "optimizer": optimizer}), learning_rate=None)
    found = find_rate(recipe, steps=12, directory=tmp_path / "sweep")
    assert found.default == pytest.approx((1000 if optimizer == "lomo" else 1) * tt.Full().rate(32), rel=0.05)
    assert len(found.losses) > 3


def test_a_run_directory_of_another_optimizer_loads(values: dict[str, Any], tmp_path: Path) -> None:
    tune(recipe_from({**values, "optimizer": "sgd", "steps": 2, "output": str(tmp_path / "run")}))
    known = open_run(tmp_path / "run")
    assert known.recipe.optimizer == "sgd"
    assert known.load("cpu")[0] is not None


def test_rows_of_an_embedding_that_no_row_reads_are_refused(values: dict[str, Any], tmp_path: Path) -> None:
    """A run would end as it began."""
    asked = {**values, "method": "embedding_rows", "learning_rate": 0.01, "output": str(tmp_path / "run")}
    job = prepare(recipe_from({**asked, "settings": {"tokens": ":"}}), Reporter())
    seen = {token for row in job.train_rows for token in row.ids}
    absent = next(token for token in range(job.model.config.vocab_size) if token not in seen)
    with pytest.raises(UserError, match=rf"none of its tokens \({absent}\)"):
        tune(recipe_from({**asked, "settings": {"tokens": str(absent)}}))
    assert not (tmp_path / "run").exists()
    result = tune(recipe_from({**asked, "settings": {"tokens": f"{absent}, {max(seen)}, {min(seen)}"}}))
    assert result.after["loss"] != result.before["loss"]
