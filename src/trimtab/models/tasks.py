"""What a model can be tuned for: whether its architecture does the task, the labels of its head, how it writes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.core.errors import UserError, listing
from trimtab.models.files import TASKS, config_problems
from trimtab.models.sources import config_of, located
from trimtab.models.starters import quiet_transformers

HEADED = ("classify", "regress")


def _mapping(task: str) -> Mapping[str, Any]:
    from transformers.models.auto import modeling_auto

    table: Mapping[str, Any] = getattr(modeling_auto, TASKS[task][1])
    return table


def check_task(config: Any, source: str | Path, task: str) -> None:
    """The architecture can do the task; one that reads both ways is not taken for a causal model."""
    kind = config.model_type
    possible = [name for name in TASKS if kind in _mapping(name)]
    saved = list(config.architectures or [])
    if task not in possible:
        raise UserError(
            f"model {source}: a {kind} model ({listing(saved) or 'no architecture named'}) cannot do task {task}",
            fix=f"use task {' or '.join(possible)}" if possible else "use a text model that generates or classifies",
        )
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    name = _mapping(task)[kind]
    names = {name} if isinstance(name, str) else set(name)
    both_ways = task == "causal" and kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if both_ways and not getattr(config, "is_decoder", False) and not names.intersection(saved):
        others = [other for other in possible if other != "causal"]
        raise UserError(
            f"model {source}: this {kind} model reads text in both directions, so it cannot generate it (task causal)",
            fix=f"use task {' or '.join(others)}, or a causal model such as smollm2-135m-instruct",
        )


def set_labels(config: Any, source: str | Path, task: str, labels: Sequence[str] | None) -> list[str]:
    """Writes the head's size and label names into `config`; notes where the checkpoint's own head says otherwise."""
    own: list[str] | None = None
    if any(str(name).endswith("ForSequenceClassification") for name in config.architectures or []):
        own = [str(config.id2label[index]) for index in sorted(config.id2label)]
    if task == "regress":
        config.num_labels = 1
        config.problem_type = "regression"
        if own is None or len(own) == 1:
            return []
        return [f"the checkpoint's own head has {len(own)} outputs; it is replaced by one output"]
    config.problem_type = "single_label_classification"
    if labels is None:
        if own is None or len(own) < 2:
            raise UserError(
                f"model {source}: task classify needs labels, since the checkpoint has no head of its own",
                fix='name the classes in the order of their ids: labels=["negative", "positive"]',
            )
        return [f"labels of the checkpoint: {listing(own)}"]
    names, notes = list(labels), []
    named = own is not None and not all(re.fullmatch(r"LABEL_\d+", label) for label in own)
    if own is not None and len(own) != len(names):
        notes.append(
            f"the checkpoint's own head is for {len(own)} labels ({listing(own)}); it is replaced by {len(names)}"
        )
    elif own is not None and named and own != names:
        if sorted(own) == sorted(names):
            raise UserError(
                f"model {source}: the checkpoint's own head has these labels in another order: {listing(own)}; "
                f"asked for {listing(names)}",
                fix=f"use labels={json.dumps(own)}",
            )
        pairs = [f"{old} -> {new}" for old, new in zip(own, names, strict=True) if old != new]
        notes.append(f"the checkpoint's own head is kept and its labels renamed: {listing(pairs)}")
    config.num_labels = len(names)
    config.id2label = dict(enumerate(names))
    config.label2id = {label: index for index, label in enumerate(names)}
    return notes


def writing_task(source: str | Path) -> str:
    """How a model that writes is trained: seq2seq where an encoder reads the prompt, else causal."""
    return "causal" if decoder_start_of(source) is None else "seq2seq"


def decoder_start_of(source: str | Path) -> int | None:
    """The first token of what a decoder writes where an encoder reads the prompt; None for models that have none."""
    location, directory = located(source, None)
    if directory is not None and config_problems(directory):
        return None
    with quiet_transformers():
        return decoder_start(config_of(location, source, hub=directory is None))


def decoder_start(config: Any) -> int | None:
    """`decoder_start_of` a model with this configuration."""
    if not getattr(config, "is_encoder_decoder", False):
        return None
    start: int | None = getattr(config, "decoder_start_token_id", None)
    return int(config.pad_token_id or 0) if start is None else start
