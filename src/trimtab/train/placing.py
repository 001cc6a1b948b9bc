"""The parts of a run's method: where each goes, what its texts say, what it starts from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from trimtab.core.errors import UserError, listing
from trimtab.core.fisher import MEASURES
from trimtab.core.method import Method, Placed
from trimtab.core.part import plan
from trimtab.core.registry import find, name_of, to_json
from trimtab.data.batches import collate
from trimtab.data.encoded import EncodedSet
from trimtab.train.job import MEASURED_ROWS, statistics_of
from trimtab.train.reporter import Reporter


def placed_parts(method: Any, where: str | None, new_modules: Sequence[str], model: nn.Module) -> list[Placed]:
    """The parts to attach: the method's own, and a dense one for modules the pretrained model does not have.

    A new module that the method trains whole itself (`headonly`, `full` everywhere) gets no second copy.
    """
    listed = [method] if isinstance(method, Method | Placed) else list(method)
    parts = [item if isinstance(item, Placed) else Placed(item, None) for item in listed]
    if where is not None:
        if len(parts) > 1:
            raise UserError("where: a preset of several parts has its own places", fix="leave `where` out")
        parts = [Placed(parts[0].method, where)]
    full = find("full")
    whole = [part for part in parts if type(part.method) is full]
    covered = {place.module for part in plan(model, whole) for place in part.places} if whole else set()
    left = [module for module in new_modules if module not in covered]
    return [*parts, Placed(full(), ", ".join(left))] if left else parts


def worded(part: Placed, tokenizer: Any) -> Placed:
    """The same part; a method that starts as a text gets its token ids, which methods cannot know."""
    text = getattr(part.method, "text", "")
    if not text or part.method.tokens:  # type: ignore[attr-defined]
        return part
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return Placed(dataclasses.replace(part.method, tokens=ids), part.where)  # type: ignore[call-arg]


def require_seen(parts: Sequence[Placed], rows: EncodedSet, model: Any) -> None:
    """Refuse a method for some tokens, of which none occurs in what it is to learn from."""
    table = model.get_input_embeddings()
    for part in parts:
        wanted = None if table is None else part.method.only_at(len(table.weight))
        if wanted is None or set(wanted) & {token for row in rows for token in (*row.ids, *(row.source or ()))}:
            continue
        name, ids = name_of(type(part.method)), listing(map(str, wanted), 8)
        raise UserError(
            f"{name}: none of its tokens ({ids}) occurs in the training rows, so it would learn nothing",
            fix="name tokens that do: --tokens with ids and ranges, such as 5,100:110",
        )


def laid_out(part: Placed, steps: int, tell: Reporter) -> Placed:
    """The same part; a method whose schedule would not end within the run gets one that does, and says so."""
    method = part.method.over(steps)
    if method == part.method:
        return part
    now, before = to_json(method), to_json(part.method)
    changed = listing(f"{key} {before[key]} -> {now[key]}" for key in now if now[key] != before[key])
    tell.note(f"{type(method).__name__} in a run of {steps} steps: {changed}")
    return Placed(method, part.where)


def measured(
    model: nn.Module, parts: Sequence[Placed], rows: EncodedSet, task: str, pad_id: int, tell: Reporter
) -> dict[str, torch.Tensor]:
    """The statistics that some methods want before they start."""
    found: dict[str, torch.Tensor] = {}
    for part in plan(model, [one for one in parts if one.method.statistics] or parts):
        wanted = part.method.statistics
        if wanted is None:
            continue
        device = next(model.parameters()).device
        text = getattr(part.method, "tokens", ())
        if text:
            tell.stage(f"measuring the {wanted} on {len(text)} tokens")
            found |= MEASURES[wanted](model, [alone(text, task, device)], part.where)
            continue
        tell.stage(f"measuring the {wanted} on {min(MEASURED_ROWS, len(rows))} rows")
        chosen = [collate([row], pad_id) for row in rows[:MEASURED_ROWS]]
        on_device = [{key: value.to(device) for key, value in batch.items()} for batch in chosen]
        found |= statistics_of(model, part, on_device, task)
    return found


def alone(tokens: Sequence[int], task: str, device: torch.device) -> dict[str, torch.Tensor]:
    """A text as a batch of its own; what a decoder would write does not matter to it."""
    ids = torch.tensor([list(tokens)], device=device)
    return {"input_ids": ids} | ({"labels": ids} if task == "seq2seq" else {})
