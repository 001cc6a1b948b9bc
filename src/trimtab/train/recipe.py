"""A recipe: one point in the space of methods, with model and data. The same names in YAML, in Python and as flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.core.errors import UserError, listing, nearest
from trimtab.train.settings import factory, made_with, method_settings, pairs, registered_settings, unfolded


def option(default: Any, text: str, group: str) -> Any:
    """A recipe field with the help text and the group its flag is shown under."""
    return field(default=default, metadata={"help": text, "group": group})


@dataclass(frozen=True)
class Recipe:
    """What to train, on what, and how. Every field is a YAML key and a flag of `trimtab tune`."""

    model: str = option("", "A model directory, a starter model's name, or a hub id.", "what")
    data: str = option("", "Training rows: jsonl, json, csv, tsv, parquet or txt, also gzipped.", "what")
    method: str = option("lora", "A method or preset, see `trimtab methods`.", "what")
    settings: Mapping[str, Any] = field(
        default_factory=dict, metadata={"help": "Settings of the method: --rank 8 and so on.", "group": "what"}
    )
    where: str | None = option(None, "Where it goes: roles, globs, layer ranges; default: the method's own.", "what")
    quantize: str | None = option(
        None, "Format of the frozen weights: nf4, absmax, affine, gptq, llm_int8, svdquant.", "what"
    )
    quantize_settings: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Settings of the format: --quantize-code-bits 3 and so on.", "group": "what"},
    )
    context: int | None = option(
        None, "Lengthen the model's context to this many tokens, by interpolating its rotary positions.", "what"
    )
    output: str | None = option(None, "Run directory to make; default: runs/<model>-<method>-<number>.", "what")

    task: str = option("auto", "causal, seq2seq, classify or regress; auto follows data and model.", "data")
    columns: Mapping[str, str] = field(
        default_factory=dict,
        metadata={"help": "Which column plays which role, as prompt=mr,completion=ref.", "group": "data"},
    )
    heldout: str = option("0.1", "Held-out part: a share (0.1), a number of rows (100), or a file.", "data")
    limit: int | None = option(None, "Use at most this many training rows, chosen by the seed.", "data")
    max_length: int | None = option(None, "Longest row in tokens; default: what the model allows.", "data")
    truncation: str = option("error", "What happens to longer rows: error, drop, left, right or split.", "data")
    train_on: str = option("completions", "Loss on completions (assistant turns) or on all tokens.", "data")

    epochs: float = option(1.0, "Passes over the training rows.", "training")
    steps: int | None = option(None, "Optimizer steps; overrides epochs.", "training")
    batch_size: int = option(8, "Rows per forward pass.", "training")
    accumulation: int = option(1, "Forward passes per optimizer step.", "training")
    learning_rate: float | None = option(
        None, "Peak learning rate, of a preset's first part; default: the method's own.", "training"
    )
    equal_rates: bool = option(
        False, "One learning rate for every part of a preset; default: in the ratio of their own rates.", "training"
    )
    schedule: str = option("linear", "linear, cosine or constant, after the warm-up.", "training")
    warmup: float = option(0.05, "Share of the steps in which the learning rate rises.", "training")
    optimizer: str = option(
        "adamw",
        "How a gradient becomes a step: sgd, lion, adafactor, adam8, paged, galore, apollo, lomo, ...",
        "training",
    )
    optimizer_settings: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Settings of the optimizer: --optimizer-rank 64 and so on.", "group": "training"},
    )
    active: str | None = option(
        None, "What trains when: lisa, badam or gradual_unfreezing; default: all, always.", "training"
    )
    active_settings: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Settings of the schedule: --active-layers 2 and so on.", "group": "training"},
    )
    weight_decay: float = option(0.0, "Decoupled weight decay on the trained tensors.", "training")
    clip: float = option(1.0, "Largest norm of the gradient; 0 switches clipping off.", "training")
    packing: str = option(
        "auto", "Rows without padding: shared (common beginnings once), plain, off; auto: where exact.", "training"
    )
    attention: str = option(
        "auto", "Attention while training: full, shifted (in groups); auto: the preset's, else full.", "training"
    )
    group: int | None = option(
        None, "Tokens in a group of shifted attention; default: a quarter of the longest row.", "training"
    )
    checkpointing: str = option(
        "off", "Recompute activations in backward: off, block, sqrt, selective or offload.", "training"
    )
    faster: bool = option(True, "Use the fast versions of norms and gates, where a trial shows them equal.", "training")
    compile: str = option(
        "off",
        "Compile the blocks with torch.compile in place of the fast versions: off or blocks.",
        "training",
    )
    bottom: str = option(
        "auto",
        "Frozen blocks below all that trains: computed, or cached, once for all epochs; auto: cached where exact.",
        "training",
    )
    evaluate_every: int | None = option(
        None, "Measure the held-out loss after this many steps, and keep the adapter of the lowest.", "training"
    )
    patience: int | None = option(None, "Stop after this many evaluations without a lower loss.", "training")
    save_every: int | None = option(
        None, "Checkpoint after this many steps; default: about once a minute; 0: never.", "training"
    )
    track: str = option("", "Also log to tensorboard, wandb or trackio; several with commas.", "training")
    keep: int = option(2, "Checkpoints kept while training; none remains when it ends.", "training")
    bake: bool = option(
        True, "Save without what only training needs, as the network that makes a prefix; no: keep it.", "training"
    )
    seed: int = option(0, "Seed of the start, the order of rows and dropout.", "training")
    dtype: str = option("auto", "Floating type of the frozen weights: auto, float32, bfloat16, float16.", "training")
    device: str = option("auto", "auto, cpu, cuda or mps.", "training")
    threads: int | None = option(None, "CPU threads; default: torch's own choice.", "training")
    shard: str = option(
        "none",
        "Frozen weights under torchrun: whole in each process (none), spread (full), or per machine (hybrid).",
        "training",
    )
    timeout: float = option(600.0, "Seconds after which a process that does not answer is an error.", "training")


ALIASES = {
    "base_model": "model",
    "model_name_or_path": "model",
    "model_name": "model",
    "dataset": "data",
    "dataset_path": "data",
    "data_path": "data",
    "train_file": "data",
    "peft_type": "method",
    "adapter": "method",
    "finetuning_type": "method",
    "target_modules": "where",
    "lora_target": "where",
    "lora_target_modules": "where",
    "lora_r": "rank",
    "lora_rank": "rank",
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "output_dir": "output",
    "sequence_len": "max_length",
    "cutoff_len": "max_length",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "model_max_length": "max_length",
    "micro_batch_size": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "eval_steps": "evaluate_every",
    "save_steps": "save_every",
    "report_to": "track",
    "save_total_limit": "keep",
    "early_stopping_patience": "patience",
    "lr": "learning_rate",
    "optim": "optimizer",
    "lr_scheduler": "schedule",
    "lr_scheduler_type": "schedule",
    "warmup_ratio": "warmup",
    "max_grad_norm": "clip",
    "gradient_checkpointing": "checkpointing",
    "torch_compile": "compile",
    "val_set_size": "heldout",
    "val_size": "heldout",
    "eval_file": "heldout",
    "max_samples": "limit",
    "torch_dtype": "dtype",
}
"""Names other tools use -> ours (a field of Recipe, or a setting of the method)."""

CHOICES = {
    "task": ("auto", "causal", "seq2seq", "classify", "regress"),
    "truncation": ("error", "drop", "left", "right", "split"),
    "train_on": ("completions", "all"),
    "packing": ("auto", "shared", "plain", "off"),
    "attention": ("auto", "full", "shifted"),
    "checkpointing": ("off", "block", "sqrt", "selective", "offload"),
    "compile": ("off", "blocks"),
    "bottom": ("auto", "cached", "computed"),
    "schedule": ("linear", "cosine", "constant"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "shard": ("none", "full", "hybrid"),
}


NAMED = {"optimizer": "optim", "active": "active", "quantize": "storage"}
"""Keys that name something registered, with its kind; `<key>_<setting>` is a setting of it."""

OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_8bit": "adam8",
    "adamw_bnb_8bit": "adam8",
    "paged_adamw": "paged",
    "paged_adamw_32bit": "paged",
    "lion_32bit": "lion",
    "galore_adamw": "galore",
    "apollo_adamw": "apollo",
}
"""Optimizers as other tools call them."""

YES = ("true", "yes", "1")
YES_OR_NO = (*YES, "false", "no", "0")
SWITCHED = {"checkpointing": ("off", "block"), "compile": ("off", "blocks")}
"""What other tools switch off and on."""


def fields() -> dict[str, dataclasses.Field[Any]]:
    """Name -> field of every recipe setting."""
    return {one.name: one for one in dataclasses.fields(Recipe)}


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML recipe; data files that are not where the command runs are looked for beside the recipe."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"recipe: cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe: {path} is not valid YAML: {error}") from None
    if not isinstance(content, Mapping):
        raise UserError(f"recipe: {path} holds no `key: value` pairs")
    return {key: beside(value, Path(path)) if is_file_key(key) else value for key, value in content.items()}


def is_file_key(key: Any) -> bool:
    """Whether a key of a recipe names a data file."""
    plain = str(key).replace("-", "_")
    return ALIASES.get(plain, plain) in ("data", "heldout")


def beside(value: Any, recipe: Path) -> Any:
    """A path that does not exist, as one from the recipe's own folder if it exists there."""
    if not isinstance(value, str) or Path(value).exists() or not (recipe.parent / value).is_file():
        return value
    return str(recipe.parent / value)


def recipe_from(values: Mapping[str, Any]) -> Recipe:
    """A checked recipe from YAML keys or flags; aliases are taken, and all problems are reported at once."""
    known = fields()
    method = values.get("method") or "lora"
    settings = set(method_settings(str(method.get("name") if isinstance(method, Mapping) else method)))
    taken: dict[str, Any] = {}
    extra: dict[str, Any] = dict(values.get("settings") or {})
    problems = said_twice(values)
    named, values = named_settings(values)
    for key, value in values.items():
        name = ALIASES.get(key.replace("-", "_"), key.replace("-", "_"))
        if name == "settings" or value is None:
            continue
        if isinstance(value, Mapping) and name == "method":
            extra |= {k: v for k, v in value.items() if k != "name"}
            taken[name] = value.get("name")
            settings = set(method_settings(str(taken[name])))
        elif name in known:
            taken[name] = value
        elif name in settings:
            extra[name] = value
        else:
            close = nearest(name, [*known, *ALIASES, *settings], 1)
            problems.append(f"unknown key {key!r}" + (f" (nearest: {close[0]})" if close else ""))
    taken |= named
    taken["settings"] = extra
    for name, value in list(taken.items()):
        try:
            taken[name] = converted(name, value, known[name])
        except (TypeError, ValueError) as error:
            problems.append(f"{name}: {error}")
    for name in ("model", "data"):
        if not taken.get(name):
            problems.append(f"`{name}` is missing")
    if problems:
        raise UserError("recipe: " + "; ".join(problems), fix="trimtab tune --help lists every key")
    return Recipe(**taken)


def said_twice(values: Mapping[str, Any]) -> list[str]:
    """Keys that are one and the same under two names, such as `lr` and `learning_rate`, with different values."""
    spelled: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        plain = str(key).replace("-", "_")
        if value is not None:
            spelled.setdefault(ALIASES.get(plain, plain), {})[f"{key}: {value}"] = value
    return [
        f"{listing(said)} are the same key"
        for said in spelled.values()
        if any(value != next(iter(said.values())) for value in said.values())
    ]


def named_settings(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the keys of an optimizer, a schedule and a format say, as fields of a recipe; and the other keys.

    `optimizer: galore`, `optimizer: {name: galore, rank: 64}`, `optimizer: {galore: {rank: 64}}` are understood, and
    `optimizer_rank: 64` beside a name.
    """
    left = {ALIASES.get(key.replace("-", "_"), key.replace("-", "_")): value for key, value in values.items()}
    taken: dict[str, Any] = {}
    for key, kind in NAMED.items():
        value, settings = left.pop(key, None), dict(left.pop(f"{key}_settings", None) or {})
        if isinstance(value, Mapping):
            name, more = unfolded(value)
            value, settings = name, settings | more
        value = OPTIMIZERS.get(str(value).lower(), value)
        own = registered_settings(str(value or Recipe.optimizer), kind) if value or key == "optimizer" else {}
        for setting in own:
            found = left.pop(f"{key}_{setting}", None)
            if found is not None:
                settings[setting] = found
        if value is not None:
            taken[key] = value
        taken[f"{key}_settings"] = settings
    return taken, left


def converted(name: str, value: Any, spec: dataclasses.Field[Any]) -> Any:
    """A value in the type of its field, from YAML's types or from a flag's text."""
    kind = str(spec.type).removesuffix(" | None")
    if name in SWITCHED and str(value).lower() in YES_OR_NO:
        value = SWITCHED[name][str(value).lower() in YES]
    if name in CHOICES and value not in CHOICES[name]:
        raise ValueError(f"{value!r} is not one of {listing(CHOICES[name])}")
    if name in ("data", "heldout") and isinstance(value, list | Mapping):
        raise ValueError("several data sets are listed in a YAML file of their own, which this names")
    if name == "where" and isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if kind.startswith("Mapping"):
        return pairs(value) if isinstance(value, str) else dict(value)
    if kind in ("int", "float"):
        number = float(value)
        if number < 0 or (kind == "int" and number != int(number)):
            raise ValueError(f"{value!r} is not a {'whole ' if kind == 'int' else ''}number of at least 0")
        return int(number) if kind == "int" else number
    if kind == "bool":
        if str(value).lower() not in YES_OR_NO:
            raise ValueError(f"{value!r} is not true or false")
        return str(value).lower() in YES
    return str(value)


def build_method(recipe: Recipe) -> Any:
    """The method (or the parts of a preset) that a recipe names, with its settings in the types of their defaults."""
    return made_with(recipe.method, factory(recipe.method), method_settings(recipe.method), recipe.settings)


def with_preset(recipe: Recipe, method: Any) -> Recipe:
    """The recipe with what its preset wants where it says nothing itself (`None`, `auto`, or what it says unasked)."""
    wanted = getattr(method, "recipe", {})
    unsaid = [key for key in wanted if getattr(recipe, key) in (None, "auto", {}, fields()[key].default)]
    taken = [key for key in unsaid if key.removesuffix("_settings") in unsaid]  # settings are those of what they set
    return dataclasses.replace(recipe, **{key: wanted[key] for key in taken})
