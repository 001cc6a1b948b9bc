"""A plan is right where a real step can be measured, its two ways agree, and it needs no weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import trimtab as tt
from trimtab.core.errors import UserError
from trimtab.engine.faster import PIECES, running
from trimtab.engine.loss import loss_sum, terms_of
from trimtab.plan.dry_run import batch_of, dry_run, gradients_named, loss_named, prepared, rows_of, tensors_of
from trimtab.plan.live import CATEGORIES, Live
from trimtab.plan.planning import new_modules_of
from trimtab.plan.process import room
from trimtab.train.recipe import recipe_from
from trimtab.train.updates import Updates

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 600,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "vocab_size": 600,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
}
BERT = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 600,
    "max_position_embeddings": 256,
}
LARGE = {
    "llama-7b": (4096, 11008, 32, 32),
    "llama-65b": (8192, 22016, 80, 64),
}


def planned(source: str, **settings: Any) -> Any:
    return tt.plan(recipe_from({"model": source, "data": "-", **settings}))


def saved(folder: Path, config: dict[str, Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def large(folder: Path, name: str) -> str:
    width, middle, layers, heads = LARGE[name]
    sizes = {"hidden_size": width, "intermediate_size": middle, "num_hidden_layers": layers}
    more = {"num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 32000}
    return saved(folder / name, LLAMA | sizes | more | {"tie_word_embeddings": False})


def real_model(config: dict[str, Any], task: str) -> Any:
    import transformers

    torch.manual_seed(0)
    made = transformers.AutoConfig.for_model(**config)
    loader = transformers.AutoModelForCausalLM if task == "causal" else transformers.AutoModelForSequenceClassification
    return loader.from_config(made)


def real_step(recipe: Any, model: Any, task: str, rows: int, length: int) -> Live:
    """Two real steps on a CPU; what is alive during the second one."""
    bench = prepared(recipe, model, task, new_modules_of(model, task), length)
    batch = batch_of(bench, rows_of(rows, length, task, 1.0, 600))
    trained = [p for p in model.parameters() if p.requires_grad]
    known = {id(p) for p in trained}
    live = Live()
    live.declare((one for one in tensors_of(model) if id(one) not in known), "weights")
    live.declare(trained, "adapter")
    policy, group = recipe.checkpointing, bench.group
    with running(model, packed=bench.packed, seam=bench.seam, pieces=PIECES, policy=policy, group=group):
        update = Updates(recipe, model, 1e-3, {})
        model.train()
        gradients_named(trained, live)
        with live, loss_named(live):
            for step in range(2):
                update.begin(step, 1e-3)
                live.forget_peak()
                loss = loss_sum(model, batch, task)[0] / terms_of(batch)
                loss.backward()
                del loss
                update.optimizer.step()
                update.optimizer.zero_grad(set_to_none=True)
    return live


CASES = [
    ("llama", {"method": "lora", "where": "all-linear"}),
    ("llama", {"method": "full"}),
    ("llama", {"method": "lora", "quantize": "nf4"}),
    ("llama", {"method": "lora", "checkpointing": "block"}),
    ("llama", {"method": "full", "optimizer": "galore", "optimizer_rank": 8}),
    ("llama", {"method": "full", "optimizer": "lomo", "clip": 0}),
    ("llama", {"method": "houlsby"}),
    ("llama", {"method": "prefix_tuning"}),
    ("gpt2", {"method": "lora"}),
    ("bert", {"method": "bit_fit"}),
    ("bert", {"method": "lora"}),
]


@pytest.mark.parametrize("family, settings", CASES, ids=lambda one: one if isinstance(one, str) else str(one))
def test_a_dry_run_is_a_real_step(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    config, task = {"llama": (LLAMA, "causal"), "gpt2": (GPT2, "causal"), "bert": (BERT, "classify")}[family]
    source = saved(tmp_path / family, config)
    recipe = recipe_from({"model": source, "data": "-", "dtype": "float32", "batch_size": 6, **settings})
    outline = _outline(source)
    bench = prepared(recipe, outline, task, new_modules_of(outline, task), 96)
    counted = dry_run(bench, batch_of(bench, rows_of(6, 96, task, 1.0, 600)))
    real = real_step(recipe, real_model(config, task), task, 6, 96)
    assert counted.peak == pytest.approx(real.peak, rel=0.03)
    for name in ("weights", "adapter"):
        assert counted.live[name] == real.at_peak[name]


def _outline(source: str) -> Any:
    from trimtab.models.loading import outline

    return outline(source)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "lora", "where": "all-linear", "rank": 16},
        {"method": "full"},
        {"method": "lora", "where": "all-linear", "quantize": "nf4-double", "checkpointing": "block"},
    ],
    ids=["lora", "full", "qlora"],
)
def test_both_ways_agree_on_large_models(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    plan = planned(large(tmp_path, name), dtype="bfloat16", batch_size=1, max_length=512, **settings)
    assert plan.apart == pytest.approx(0, abs=0.05)


@pytest.mark.slow
def test_depths_foretell_the_whole_stack(tmp_path: Path) -> None:
    source = saved(tmp_path / "deep", LLAMA | {"num_hidden_layers": 30})
    settings = {"dtype": "float32", "batch_size": 2, "max_length": 128, "method": "lora", "where": "all-linear"}
    short = planned(source, **settings)
    recipe = recipe_from({"model": source, "data": "-", **settings})
    bench = prepared(recipe, _outline(source), "causal", [], 128)
    whole = dry_run(bench, batch_of(bench, rows_of(2, 128, "causal", 1.0, 600)))
    assert short.step_bytes == pytest.approx(whole.peak, rel=1e-3)
    assert short.flops_per_step == whole.flops
    assert short.trained == whole.trained


@pytest.mark.slow
def test_planning_65b_takes_seconds_and_little_memory(tmp_path: Path) -> None:
    source = large(tmp_path, "llama-65b")
    code = (
        "import json, os, resource, sys, trimtab as tt\n"
        "p = tt.plan(tt.Recipe(model=sys.argv[1], dtype='bfloat16', batch_size=1, max_length=512, where='all-linear',\n"
        "            settings={'rank': 16}, quantize='nf4-double', checkpointing='block'), fit='48GB')\n"
        "print(json.dumps([p.peak_memory_bytes, p.fits, p.memory['weights'], p.trained,\n"
        "                  resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, sum(os.times()[:2])]))"
    )
    done = subprocess.run([sys.executable, "-c", code, source], capture_output=True, text=True, check=True)
    _, fits, weights, trained, resident, spent = json.loads(done.stdout)
    assert fits  # 65B in four bits with its adapters, their gradients and states: under 48 GB
    assert weights == pytest.approx(34.46e9, rel=0.01)
    assert trained == 199_884_800
    assert resident < 2e9
    assert spent < 30  # of processor time, imports included


@pytest.mark.slow
def test_operations_are_four_and_six_per_weight(tmp_path: Path) -> None:
    source = large(tmp_path, "llama-7b")
    settings = {"dtype": "bfloat16", "batch_size": 1, "max_length": 128}
    low = planned(source, method="lora", where="all-linear", rank=16, **settings)
    full = planned(source, method="full", **settings)
    products = 6_738_415_616 - 32000 * 4096  # without the input embedding
    head = 32000 * 4096
    assert low.flops_per_token == pytest.approx(4 * products + 6 * low.trained, rel=0.02)
    assert full.flops_per_token == pytest.approx(6 * (products - head) + 4 * head, rel=0.02)  # the head is frozen


class Counter(TorchDispatchMode):
    """A mode that does not say that it only watches."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_only_a_watching_mode_leaves_products_in_one_function() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8))
    tt.attach(layer, tt.LoRA(rank=2), where="*")
    x = torch.randn(3, 8)
    with Live():
        watched = layer(x)
    with Counter():
        plain = layer(x)
    assert watched.grad_fn.name() == layer(x).grad_fn.name() != plain.grad_fn.name()


def test_living_bytes_are_counted_once_and_let_go() -> None:
    live = Live()
    with live, live.during("activations"):
        x = torch.ones(1000)
        y = x.view(10, 100)[1:]
        assert live.now["activations"] == 4000
        z = x + 1
        assert live.now["activations"] == 8000
        del x, z
        assert live.now["activations"] == 4000
        del y
    assert live.now["activations"] == 0
    assert live.peak == 8000
    assert set(live.at_peak) == set(CATEGORIES)


def test_sizes_and_devices() -> None:
    assert room("24GB").bytes == 24e9
    assert room("16 GiB").bytes == 16 * 2**30
    assert room("rtx4090").bytes == 24e9
    assert room(None).bytes > 0
    with pytest.raises(UserError, match="no size and no known device"):
        room("big")


def test_a_plan_leaves_random_numbers_and_torch_alone(tmp_path: Path) -> None:
    source = saved(tmp_path / "m", LLAMA)
    attention, truth = torch.nn.functional.scaled_dot_product_attention, "__bool__" in vars(torch.Tensor)
    planned(source, dtype="float32", batch_size=1, max_length=16)
    assert torch.nn.functional.scaled_dot_product_attention is attention
    assert ("__bool__" in vars(torch.Tensor)) == truth


def test_the_command_and_what_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from trimtab.cli.main import main

    source = saved(tmp_path / "m", LLAMA)
    command = ["plan", "--model", f"{source}/config.json", "--dtype", "float32", "--length", "64", "--json"]
    assert main([*command, "--method", "lora,full", "--rank", "4"]) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert [one["recipe"]["method"] for one in plans] == ["lora", "full"]
    assert plans[0]["recipe"]["settings"] == {"rank": "4"}
    assert plans[0]["peak_memory_bytes"] == sum(plans[0]["memory"].values())
    assert main([*command, "--method", "bit_fit,lora"]) == 0
    one, other = json.loads(capsys.readouterr().out)["plans"]
    assert "has a bias" in one["problem"]
    assert other["recipe"]["method"] == "lora"
    assert main(["plan", "--model", source, "--method", "lora", "--rnak", "4"]) == 2
    assert "rank" in capsys.readouterr().err
    assert main([*command, "--fit", "1.1GB"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = [one["name"] for one in found["fits"]]
    assert names
    assert all(one["peak_memory_bytes"] <= 1.1e9 for one in found["fits"])
    assert "2402.09353" in found["order"]


def test_another_floating_type_than_the_files_needs_both_while_loading(tmp_path: Path) -> None:
    source = saved(tmp_path, LLAMA | {"dtype": "float32", "vocab_size": 200_000})
    same, other = (planned(source, dtype=one, max_length=16, batch_size=1) for one in ("float32", "bfloat16"))
    assert "loading" not in same.memory
    assert other.peak_memory_bytes == pytest.approx(other.memory["process"] + 6 * other.parameters, rel=1e-6)
    assert other.memory["loading"] > 0


def test_a_gpu_holds_no_file(tmp_path: Path) -> None:
    source = saved(tmp_path, LLAMA | {"dtype": "float32", "vocab_size": 200_000})
    found = tt.plan(recipe_from({"model": source, "data": "-", "dtype": "bfloat16", "max_length": 16}), fit="24GB")
    assert "loading" not in found.memory
