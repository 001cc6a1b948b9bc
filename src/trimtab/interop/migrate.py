"""Recipes of axolotl, LLaMA-Factory and of TRL and PEFT as recipes of ours, with a list of what has no counterpart.

Each program is a table: its key -> ours, or a small function where one key becomes several or a word has another name.
Nothing is guessed: a key in no table is told as it stands.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.core.errors import UserError
from trimtab.interop.migrate_rules import (
    COMMON,
    HARMLESS,
    LOST,
    MARKS,
    PROGRAMS,
    Migrated,
    Values,
)
from trimtab.interop.peft.table import row_of
from trimtab.train.recipe import fields


def migrate(path: str | Path) -> Migrated:
    """The recipe in a YAML or JSON file of another program, as one of ours."""
    values = read(path)
    if "peft_type" in values and not values.keys() & {"dataset_name", "dataset", "datasets", "output_dir"}:
        return of_peft(values)
    program = program_of(values, path)
    made = Migrated(program)
    rules = COMMON | PROGRAMS[program]
    taken: Values = {}
    for key, value in values.items():
        plain = str(key).replace("-", "_")
        if plain in HARMLESS or value is None or value in ([], {}):
            continue
        if plain in LOST or plain not in rules:
            made.lost.append((plain, value, LOST.get(plain, "no counterpart")))
            continue
        for name, one in rules[plain](value, values, made).items():
            known = taken.get(name)
            if name == "method" and known not in (None, "lora"):
                continue  # DoRA over a plain `adapter: lora`
            taken[name] = known | one if isinstance(known, dict) else one
    made.recipe = ordered(taken)
    if not values.keys() & {"adapter", "finetuning_type", "peft_type", "use_peft"} and "method" not in made.recipe:
        made.notes.append("no method is named there; here it is lora unless `method` says otherwise")
    return checked(made)


def read(path: str | Path) -> Values:
    """The mapping in a file."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        content = json.loads(text) if str(path).endswith(".json") else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"migrate: {path} cannot be read: {error}") from None
    if not isinstance(content, Mapping):
        raise UserError(f"migrate: {path} holds no `key: value` pairs")
    return dict(content)


def program_of(values: Mapping[str, Any], path: str | Path) -> str:
    """Whose recipe it is: the program most of whose marks it has."""
    scores = {program: len(marks & values.keys()) for program, marks in MARKS.items()}
    best = max(scores, key=lambda program: scores[program])
    if not scores[best]:
        raise UserError(
            f"migrate: {path} is no recipe of {', '.join(MARKS)}, nor a PEFT config",
            fix="its keys are " + ", ".join(list(map(str, values))[:8]),
        )
    return best


def of_peft(values: Mapping[str, Any]) -> Migrated:
    """A PEFT `adapter_config.json`: method, settings and sites, without model data."""
    made = Migrated("PEFT")
    row = row_of(values)
    known = {"LORA": "lora", "PROMPT_TUNING": "prompt_tuning", "P_TUNING": "p_tuning", "PREFIX_TUNING": "prefix_tuning"}
    known |= {"LN_TUNING": "ln_tuning", "ADAPTION_PROMPT": "llama_adapter", "TRAINABLE_TOKENS": "embedding_rows"}
    name = row.method if row is not None else known.get(values["peft_type"])
    if name is None:
        raise UserError(f"migrate: PEFT's {values['peft_type']} has no counterpart here")
    taken: Values = {"method": name, "model": values.get("base_model_name_or_path")}
    keys = {key: ours for ours, key in row.settings.items()} if row is not None else {}
    if name == "lora":
        keys = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
    if name in ("prompt_tuning", "p_tuning", "prefix_tuning"):
        keys = {"num_virtual_tokens": "length"}
    for key, value in values.items():
        if key in ("peft_type", "base_model_name_or_path", "task_type") or key in HARMLESS or not value:
            continue
        if key in keys:
            taken[f"settings.{keys[key]}"] = value
        elif key in ("target_modules", "use_rslora", "use_dora"):
            taken |= COMMON[key](value, values, made)
        elif key not in ("fan_in_fan_out", "bias", "init_lora_weights") or value not in (True, "none"):
            made.lost.append((key, value, LOST.get(key, "no counterpart")))
    made.recipe = ordered(taken)
    return checked(made)


def ordered(taken: Mapping[str, Any]) -> Values:
    """A recipe in the order of its fields, settings of the method in one mapping."""
    settings = {key.partition(".")[2]: value for key, value in taken.items() if key.startswith("settings.")}
    plain = {key: value for key, value in taken.items() if not key.startswith("settings.")}
    plain |= {"settings": settings} if settings else {}
    return {name: plain[name] for name in fields() if plain.get(name) is not None}


def checked(made: Migrated) -> Migrated:
    """What our own reader says to the result; settings that the method does not have are told as lost."""
    from trimtab.train.recipe import recipe_from
    from trimtab.train.settings import method_settings

    try:
        known = method_settings(str(made.recipe.get("method", "lora")))
    except UserError as error:
        made.lost.append(("method", made.recipe.pop("method"), error.message))
        known = method_settings("lora")
    settings = made.recipe.get("settings", {})
    for key in [key for key in settings if key not in known]:
        made.lost.append((key, settings.pop(key), f"{made.recipe.get('method', 'lora')} has no such setting"))
    missing = [name for name in ("model", "data") if not made.recipe.get(name)]
    made.notes += [f"`{name}` is missing: add it before tuning" for name in missing]
    recipe_from(made.recipe | dict.fromkeys(missing, "FILL_IN"))
    return made
