"""Recipes of other programs: what they say becomes ours, and what has no counterpart is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from trimtab.cli.main import main
from trimtab.core.errors import UserError
from trimtab.interop.migrate import migrate
from trimtab.train.recipe import build_method, recipe_from

AXOLOTL = """
base_model: NousResearch/Llama-3.2-1B
load_in_4bit: true
adapter: qlora
datasets:
  - path: data/alpaca.jsonl
    type: alpaca
val_set_size: 0.05
output_dir: ./outputs/out
sequence_len: 2048
sample_packing: true
pad_to_sequence_len: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
peft_use_dora: false
wandb_project: mine
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 3
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: 0.0002
train_on_inputs: false
bf16: auto
tf32: false
gradient_checkpointing: true
logging_steps: 1
flash_attention: true
warmup_steps: 10
weight_decay: 0.0
neftune_noise_alpha: 5
special_tokens:
  pad_token: "<|end_of_text|>"
"""
FACTORY = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
pissa_init: true
dataset: data/identity.json,alpaca_en_demo
template: llama3
cutoff_len: 1024
max_samples: 1000
output_dir: saves/llama3-8b/lora/sft
plot_loss: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
quantization_bit: 4
val_size: 0.1
adam_beta2: 0.95
"""
TRL = """
model_name_or_path: Qwen/Qwen2-0.5B
dataset_name: rows.jsonl
learning_rate: 2.0e-4
num_train_epochs: 1
packing: true
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
max_length: 512
assistant_only_loss: true
use_peft: true
lora_r: 32
lora_alpha: 16
use_rslora: true
lora_target_modules: [q_proj, v_proj]
max_steps: 200
warmup_steps: 20
eval_steps: 100
dpo_beta: 0.1
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "theirs.yaml"
    path.write_text(text)
    return path


def test_axolotl(tmp_path: Path) -> None:
    made = migrate(written(tmp_path, AXOLOTL))
    assert made.program == "axolotl"
    recipe = recipe_from(made.recipe)
    assert (recipe.method, recipe.quantize, recipe.where) == ("lora", "nf4-double", "all-linear")
    assert dict(recipe.settings) == {"rank": 32, "alpha": 16, "dropout": 0.05}
    assert (recipe.model, recipe.data, recipe.heldout) == ("NousResearch/Llama-3.2-1B", "data/alpaca.jsonl", "0.05")
    assert (recipe.max_length, recipe.truncation, recipe.packing) == (2048, "drop", "auto")
    assert (recipe.batch_size, recipe.accumulation, recipe.epochs) == (2, 4, 3.0)
    assert (recipe.optimizer, recipe.schedule, recipe.learning_rate) == ("paged", "cosine", 2e-4)
    assert (recipe.checkpointing, recipe.train_on) == ("block", "completions")
    assert {key for key, *_ in made.lost} == {"warmup_steps", "neftune_noise_alpha", "special_tokens"}
    assert build_method(recipe).rank == 32


def test_llama_factory(tmp_path: Path) -> None:
    made = migrate(written(tmp_path, FACTORY))
    assert made.program == "LLaMA-Factory"
    recipe = recipe_from(made.recipe)
    assert (recipe.method, recipe.quantize, recipe.where) == ("PiSSA", "nf4-double", "all-linear")
    assert dict(recipe.settings) == {"rank": 8}
    assert (recipe.max_length, recipe.truncation, recipe.limit) == (1024, "right", 1000)
    assert (recipe.dtype, recipe.warmup, recipe.data) == ("bfloat16", 0.1, "data/identity.json")
    assert recipe.optimizer_settings == {"beta2": 0.95}
    assert {key for key, *_ in made.lost} == {"trust_remote_code", "dataset", "template"}


def test_trl(tmp_path: Path) -> None:
    made = migrate(written(tmp_path, TRL))
    assert made.program == "TRL"
    recipe = recipe_from(made.recipe)
    assert (recipe.where, recipe.settings["rank_power"]) == ("q_proj, v_proj", 0.5)
    assert (recipe.steps, recipe.warmup, recipe.evaluate_every) == (200, 0.1, 100)
    assert (recipe.max_length, recipe.truncation, recipe.train_on) == (512, "right", "completions")
    assert [(key, why) for key, _, why in made.lost] == [("dpo_beta", "no counterpart")]


@pytest.mark.parametrize(
    ("config", "method", "settings"),
    [
        ({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"]}, "lora", {"rank": 4, "alpha": 8}),
        ({"peft_type": "LOHA", "r": 4, "alpha": 8}, "loha", {"rank": 4, "alpha": 8}),
        ({"peft_type": "VBLORA", "r": 4, "topk": 3, "num_vectors": 90}, "vb_lora", {"rank": 4, "k": 3, "vectors": 90}),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 7}, "prompt_tuning", {"length": 7}),
    ],
)
def test_a_peft_config(config: dict[str, Any], method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(config | {"base_model_name_or_path": "base", "inference_mode": True}))
    made = migrate(path)
    assert made.recipe["method"] == method
    assert made.recipe["settings"] == settings
    assert made.recipe["model"] == "base"
    assert any("`data` is missing" in note for note in made.notes)


def test_frozen_layers_and_other_methods(tmp_path: Path) -> None:
    text = "model_name_or_path: m\nfinetuning_type: freeze\nfreeze_trainable_layers: 3\ndataset: d.json\n"
    assert migrate(written(tmp_path, text)).recipe["method"] == "TopLayers"
    text = "base_model: m\nadapter: llama-adapter-v9\ndatasets: [{path: d.jsonl}]\nmicro_batch_size: 1\n"
    made = migrate(written(tmp_path, text))
    assert "method" not in made.recipe
    assert made.lost[0][:2] == ("method", "llama-adapter-v9")


def test_what_is_no_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no recipe of axolotl, LLaMA-Factory, TRL"):
        migrate(written(tmp_path, "a: 1\nb: 2\n"))
    with pytest.raises(UserError, match="holds no"):
        migrate(written(tmp_path, "- 1\n"))
    with pytest.raises(UserError, match="cannot be read"):
        migrate(tmp_path / "nowhere.yaml")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = written(tmp_path, AXOLOTL), tmp_path / "recipe.yaml"
    assert main(["migrate", str(path), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "neftune_noise_alpha" in told
    assert "no noise is put on embeddings" in told
    assert yaml.safe_load(out.read_text()) == migrate(path).recipe
    assert main(["migrate", str(path), "--out", str(out)]) == 2
    assert main(["migrate", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["program"] == "axolotl"
