"""What the keys of other programs' recipes are in ours: a table for each program, and small functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.train.recipe import ALIASES, OPTIMIZERS, fields

Values = dict[str, Any]


@dataclass
class Migrated:
    """A recipe of ours made of another one."""

    program: str
    recipe: Values = field(default_factory=dict)
    lost: list[tuple[str, Any, str]] = field(default_factory=list)
    """(key, value, why) of everything that has no counterpart."""
    notes: list[str] = field(default_factory=list)


Rule = Callable[[Any, Mapping[str, Any], Migrated], Values]
HARMLESS = {
    **dict.fromkeys(
        "logging_steps logging_dir logging_first_step run_name wandb_project wandb_entity wandb_name wandb_run_id "
        "wandb_watch wandb_log_model mlflow_experiment_name comet_project_name plot_loss overwrite_output_dir "
        "overwrite_cache preprocessing_num_workers dataloader_num_workers dataset_prepared_path dataset_processes "
        "include_tokens_per_second disable_tqdm log_level ddp_timeout local_rank push_to_hub hub_model_id "
        "hub_strategy save_safetensors save_strategy eval_strategy evaluation_strategy do_train do_eval stage "
        "strict debug is_llama_derived_model model_type tokenizer_type base_model_config tokenizer_config "
        "flash_attention flash_attn xformers_attention sdp_attention attn_implementation tf32 group_by_length "
        "gradient_checkpointing_kwargs bnb_4bit_compute_dtype bnb_4bit_quant_type eval_batch_size "
        "per_device_eval_batch_size eval_table_size evals_per_epoch saves_per_epoch dataset_info dataset_dir "
        "pad_to_sequence_len eval_sample_packing fsdp fsdp_config deepspeed use_peft auto_mapping inference_mode "
        "peft_version revision init_weights resume_from_checkpoint auto_resume_from_checkpoints template_dir "
        "use_fast_tokenizer low_cpu_mem_usage load_best_model_at_end remove_unused_columns".split(),
        "about logging, speed or files only",
    )
}
"""Keys that say nothing about what is trained; they are left out without a word."""


def to(name: str) -> Rule:
    """One of our keys with the same value."""
    return lambda value, values, made: {name: value}


def setting(name: str) -> Rule:
    """A setting of the method."""
    return lambda value, values, made: {f"settings.{name}": value}


def of_optimizer(name: str) -> Rule:
    """A setting of the optimizer."""
    return lambda value, values, made: {"optimizer_settings": {name: float(value)}}


def adapter(value: Any, values: Mapping[str, Any], made: Migrated) -> Values:
    """`lora`, `qlora` and others by their names."""
    word = str(value or "full").lower()
    if word == "qlora":
        return {"method": "lora", "quantize": "nf4-double"}
    if word == "freeze":
        layers = values.get("freeze_trainable_layers") or 2
        return {"method": "TopLayers", "settings.layers": abs(int(layers))}
    return {"method": word}


def targets(value: Any, values: Mapping[str, Any], made: Migrated) -> Values:
    """Modules by name; `all` and `all-linear` are ours too."""
    words = [one.strip() for one in value.split(",")] if isinstance(value, str) else list(value or [])
    if words in (["all"], ["all-linear"]):
        return {"where": "all-linear"}
    return {"where": ", ".join(words)} if words else {}


def linear(value: Any, values: Mapping[str, Any], made: Migrated) -> Values:
    return {"where": "all-linear"} if value else {}


def four_bits(value: Any, values: Mapping[str, Any], made: Migrated) -> Values:
    double = values.get("bnb_4bit_use_double_quant", values.get("use_bnb_nested_quant", True))
    return {"quantize": "nf4-double" if double else "nf4"} if value else {}


def eight_bits(value: Any, values: Mapping[str, Any], made: Migrated) -> Values:
    return {"quantize": "absmax"} if value else {}


def bits(value: Any, values: Mapping[str, Any], made: Migrated) -> Values:
    """LLaMA-Factory's number of bits."""
    if int(value) == 4:
        return {"quantize": "nf4-double" if values.get("double_quantization", True) else "nf4"}
    if int(value) == 8:
        return {"quantize": "absmax"}
    made.lost.append(("quantization_bit", value, "weights are kept in 4 or 8 bits"))
    return {}


def rank_stabilized(value: Any, values: Mapping[str, Any], made: Migrated) -> Values:
    return {"settings.rank_power": 0.5} if value else {}


def dora(value: Any, values: Mapping[str, Any], made: Migrated) -> Values:
    return {"method": "DoRA"} if value else {}


def pissa(value: Any, values: Mapping[str, Any], made: Migrated) -> Values:
    return {"method": "PiSSA"} if value else {}


def ratio(value: Any, values: Mapping[str, Any], made: Migrated) -> Values:
    """LoRA+: a multiple of the learning rate for B."""
    return {"optimizer": "lora_plus", "optimizer_settings": {"ratio": float(value)}} if value else {}


def datasets(value: Any, values: Mapping[str, Any], made: Migrated) -> Values:
    """axolotl's list of data sets: the first file; its type is seen in the rows themselves."""
    listed = value if isinstance(value, list) else [value]
    paths = [one.get("path") if isinstance(one, Mapping) else one for one in listed]
    if len(paths) > 1:
        made.lost.append(("datasets", paths[1:], SEVERAL))
    first = listed[0] if isinstance(listed[0], Mapping) else {}
    files = first.get("data_files")
    path = files[0] if isinstance(files, list) and files else files or paths[0]
    columns = {ours: first[theirs] for theirs, ours in COLUMNS.items() if theirs in first}
    if first.get("type"):
        made.notes.append(f"the form of the rows ({first['type']}) is seen in their columns: check with `trimtab data`")
    return {"data": path} | ({"columns": columns} if columns else {})


SEVERAL = "a recipe names one data file: list them in a YAML file (`- path: FILE`), and let `data` name that"
COLUMNS = {"field_instruction": "prompt", "field_output": "completion", "field": "text"}


def named_data(value: Any, values: Mapping[str, Any], made: Migrated) -> Values:
    """A data set known by its name elsewhere: the name is kept, a file has to take its place."""
    names = [one.strip() for one in str(value).split(",")]
    if len(names) > 1:
        made.lost.append(("dataset", names[1:], SEVERAL))
    if not Path(names[0]).suffix:
        made.notes.append(f"data: {names[0]!r} is a name there and has to be a file here")
    return {"data": names[0]}


def cut(name: str) -> Rule:
    """The longest row, and what the other program does with longer ones."""
    return lambda value, values, made: {"max_length": int(value), "truncation": name}


def packing(value: Any, values: Mapping[str, Any], made: Migrated) -> Values:
    return {"packing": "auto" if value else "off"}


def on_inputs(value: Any, values: Mapping[str, Any], made: Migrated) -> Values:
    return {"train_on": "all" if value else "completions"}


def only_completions(value: Any, values: Mapping[str, Any], made: Migrated) -> Values:
    return {"train_on": "completions" if value else "all"}


def heldout(value: Any, values: Mapping[str, Any], made: Migrated) -> Values:
    return {"heldout": str(value)} if value else {"heldout": "0"}


def warmup_steps(value: Any, values: Mapping[str, Any], made: Migrated) -> Values:
    """A number of steps is a share only where the number of all steps is known."""
    total = values.get("max_steps")
    if total and int(total) > 0:
        return {"warmup": round(float(value) / float(total), 6)}
    if value:
        made.lost.append(
            ("warmup_steps", value, "a share of the steps is `warmup`, and how many there are is not known")
        )
    return {}


def scheduler(value: Any, values: Mapping[str, Any], made: Migrated) -> Values:
    words = {"constant_with_warmup": "constant", "cosine_with_restarts": "cosine"}
    word = words.get(str(value), str(value))
    if word not in ("linear", "cosine", "constant"):
        made.lost.append(("lr_scheduler", value, "schedules are linear, cosine and constant"))
        return {}
    return {"schedule": word}


def optimizer(value: Any, values: Mapping[str, Any], made: Migrated) -> Values:
    from trimtab.core.registry import names

    word = str(value).lower()
    found = OPTIMIZERS.get(word, word)
    if found not in names("optim"):
        made.lost.append(("optimizer", value, "there is none of this name; adamw is used"))
        return {}
    return {"optimizer": found}


def steps(value: Any, values: Mapping[str, Any], made: Migrated) -> Values:
    return {"steps": int(value)} if int(value) > 0 else {}


def precision(word: str) -> Rule:
    return lambda value, values, made: {"dtype": word} if value is True or str(value).lower() == "true" else {}


def galore(value: Any, values: Mapping[str, Any], made: Migrated) -> Values:
    rank = {"rank": int(values["galore_rank"])} if "galore_rank" in values else {}
    return {"optimizer": "galore", "optimizer_settings": rank} if value else {}


def badam(value: Any, values: Mapping[str, Any], made: Migrated) -> Values:
    return {"active": "badam"} if value else {}


def tracked(value: Any, values: Mapping[str, Any], made: Migrated) -> Values:
    words = value if isinstance(value, list) else [value]
    known = [one for one in words if one in ("tensorboard", "wandb", "trackio")]
    return {"track": ",".join(known)} if known else {}


def checkpointing(value: Any, values: Mapping[str, Any], made: Migrated) -> Values:
    return {"checkpointing": "block" if value else "off"}


def nothing(why: str) -> Rule:
    """A key that is heeded by another one, or has to be told as lost with its reason."""

    def rule(value: Any, values: Mapping[str, Any], made: Migrated) -> Values:
        return {}

    rule.__doc__ = why
    return rule


HEEDED = nothing("read with another key")
COMMON: dict[str, Rule] = {
    **{key: to(name) for key, name in ALIASES.items() if name in fields() and name not in ("data", "method", "where")},
    **{key: setting(name) for key, name in ALIASES.items() if name in ("rank", "alpha", "dropout")},
    **{key: to(key) for key in ("learning_rate", "weight_decay", "seed")},
    "load_in_4bit": four_bits,
    "load_in_8bit": eight_bits,
    "use_rslora": rank_stabilized,
    "use_dora": dora,
    "lora_target_modules": targets,
    "target_modules": targets,
    "lora_target": targets,
    "warmup_steps": warmup_steps,
    "lr_scheduler": scheduler,
    "lr_scheduler_type": scheduler,
    "optimizer": optimizer,
    "optim": optimizer,
    "max_steps": steps,
    "packing": packing,
    "gradient_checkpointing": checkpointing,
    "bf16": precision("bfloat16"),
    "fp16": precision("float16"),
    "report_to": tracked,
    "bnb_4bit_use_double_quant": HEEDED,
    "use_bnb_nested_quant": HEEDED,
    "adam_beta1": of_optimizer("beta1"),
    "adam_beta2": of_optimizer("beta2"),
    "adam_epsilon": of_optimizer("epsilon"),
}
PROGRAMS: dict[str, dict[str, Rule]] = {
    "axolotl": {
        "adapter": adapter,
        "datasets": datasets,
        "lora_target_linear": linear,
        "peft_use_rslora": rank_stabilized,
        "peft_use_dora": dora,
        "sequence_len": cut("drop"),
        "sample_packing": packing,
        "train_on_inputs": on_inputs,
        "val_set_size": heldout,
        "loraplus_lr_ratio": ratio,
        "unfrozen_parameters": nothing(""),
        "bf16": lambda value, values, made: {} if value == "auto" else precision("bfloat16")(value, values, made),
    },
    "LLaMA-Factory": {
        "finetuning_type": adapter,
        "dataset": named_data,
        "quantization_bit": bits,
        "double_quantization": HEEDED,
        "cutoff_len": cut("right"),
        "train_on_prompt": on_inputs,
        "val_size": heldout,
        "loraplus_lr_ratio": ratio,
        "pissa_init": pissa,
        "use_galore": galore,
        "galore_rank": HEEDED,
        "use_badam": badam,
        "freeze_trainable_layers": HEEDED,
        "neat_packing": packing,
    },
    "TRL": {
        "dataset_name": named_data,
        "dataset_path": named_data,
        "max_length": cut("right"),
        "max_seq_length": cut("right"),
        "completion_only_loss": only_completions,
        "assistant_only_loss": only_completions,
        "peft_type": adapter,
        "lora_task_type": HEEDED,
    },
}
"""Program -> its keys beside the common ones."""
MARKS = {
    "axolotl": {"base_model", "datasets", "adapter", "micro_batch_size", "sequence_len", "sample_packing"},
    "LLaMA-Factory": {"finetuning_type", "cutoff_len", "dataset_dir", "template", "stage", "lora_target"},
    "TRL": {"dataset_name", "use_peft", "completion_only_loss", "assistant_only_loss", "max_length", "lora_r"},
}
"""Keys by which a program's recipe is known."""
LOST = {
    "chat_template": "the tokenizer's own chat template is used",
    "template": "the tokenizer's own chat template is used",
    "special_tokens": "tokens are not added here",
    "tokens": "tokens are not added here",
    "neftune_noise_alpha": "no noise is put on embeddings",
    "trust_remote_code": "code that comes with a model is never run",
    "unfrozen_parameters": "give `where` and method full",
    "lora_modules_to_save": "`where` and a part of its own, in Python",
    "modules_to_save": "`where` and a part of its own, in Python",
    "rl": "only supervised tuning is done here",
    "additional_target": "`where` and a part of its own, in Python",
}
"""Why some keys are lost."""
