"""Reserved positions of virtual tokens, and which tokens are prompt: hooks on the stacks of a model.

A *stack* is the module that turns ids into hidden states (LlamaModel, BertModel, one T5Stack each side). Two hooks on
it reserve positions for virtual tokens and take them off again, so labels, logits, caches and `generate` never see
them. They come in front; behind the text only in a bidirectional stack that counts positions or pools, whose first
token has to stay the first.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.batch import Batch, Slots
from trimtab.core.errors import UserError
from trimtab.core.method import InputMethod
from trimtab.core.state import State


@dataclass(frozen=True)
class Stack:
    """How to run the hooks of one stack: its path, argument names, and where virtual tokens go."""

    path: str
    names: tuple[str, ...]
    causal: bool
    filler: int
    front: bool
    """Whether virtual tokens come before the text."""
    counts: bool
    """Whether the places of virtual tokens behind the text have to be told: padding in between would move them."""


def stack_of(model: nn.Module, path: str) -> Stack | None:
    """The stack a module at `path` belongs to: its nearest ancestor whose forward takes `input_ids`.

    A module that only embeds them takes no `attention_mask`, and counts where no module above it does either.
    """
    parts = path.split(".")
    found: list[tuple[str, tuple[str, ...]]] = []
    for end in range(len(parts) - 1, -1, -1):
        above = ".".join(parts[:end])
        module = model.get_submodule(above)
        names = tuple(inspect.signature(module.forward).parameters)
        if "input_ids" not in names or (above == "" and any(_takes_them(child, names) for child in module.children())):
            continue
        found.append((above, names))
    chosen = next((one for one in found if "attention_mask" in one[1]), found[0] if found else None)
    return None if chosen is None else _stack(model, *chosen)


def _stack(model: nn.Module, path: str, names: tuple[str, ...]) -> Stack:
    module = model.get_submodule(path)
    config = getattr(module, "config", None)
    says = any(getattr(part, "is_causal", False) for part in module.modules())  # GPT-NeoX's config calls it no decoder
    causal = "past_key_values" in names and (says or getattr(config, "is_decoder", True) is not False)
    padding = getattr(config, "pad_token_id", None)
    front = causal or ("position_ids" not in names and getattr(module, "pooler", None) is None)
    tables = [part for name, part in module.named_modules() if name.endswith("position_embeddings")]
    skips = any(getattr(table, "padding_idx", None) is not None for table in tables)  # it counts real tokens itself
    counts = not front and not skips and "position_ids" in names
    return Stack(path, names, causal, 1 if padding == 0 else 0, front, counts)


def _takes_them(module: nn.Module, names: Sequence[str]) -> bool:
    """Whether a module takes what one around it does of ids and their mask: the one around has a head beside it."""
    own = inspect.signature(module.forward).parameters
    return all(name in own for name in ("input_ids", "attention_mask") if name in names)


def reserve(stack: Stack, state: State, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook of a stack: records the batch, and adds reserved positions to everything sequence-shaped."""
    call = dict(zip(stack.names, args, strict=False)) | kwargs
    ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
    tokens = ids if ids is not None else embeds
    if tokens is None:
        raise UserError(
            "forward: neither input_ids nor inputs_embeds was given to a model with adapters that need them"
        )
    past = call.get("past_key_values")
    done = past.get_seq_length() if past is not None and stack.causal else 0
    rows, length = tokens.shape[:2]

    groups = [(state.active, list(range(rows)))] if state.rows is None else state.row_groups(rows)
    wanted = list(reserved(stack, state))
    needs = {names: sum(count for name, _, count in wanted if name in names) for names, _ in groups}
    total = max(needs.values())
    mask = call.get("attention_mask")
    if total and mask is not None and mask.ndim != 2:
        raise UserError(
            f"forward: virtual tokens need a 2-D attention mask (rows, positions), found {mask.ndim}-D",
            fix="pass the padding mask and let the model build the rest (generate: use a dynamic cache)",
        )
    real = (
        mask[:, -length:].bool()
        if mask is not None and mask.ndim == 2
        else tokens.new_ones(rows, length, dtype=torch.bool)
    )
    prompt = None if done else real
    if prompt is not None and stack.causal and state.prompt is not None and state.prompt.shape == prompt.shape:
        prompt = prompt & state.prompt
    order, lengths = state.packed if state.packed is not None else (None, None)
    if order is not None and lengths is not None:
        prompt = order < lengths

    if total:
        where = "front" if stack.front else "back"
        live = torch.ones(rows, total, dtype=torch.bool, device=tokens.device)
        for names, index in groups:
            if needs[names] < total:
                live[index] = _beside(needs[names], total, where).to(tokens.device)
        if mask is None and (done or not bool(live.all())):
            mask = tokens.new_ones(rows, length + max(0, done - total), dtype=torch.long)
        if mask is not None:
            call["attention_mask"] = _join(live.to(mask.dtype), mask, where)
        if not done:
            if ids is not None:
                call["input_ids"] = _join(ids.new_full((rows, total), stack.filler), ids, where)
            else:
                call["inputs_embeds"] = _join(embeds.new_zeros(rows, total, embeds.shape[2]), embeds, where)
            types = call.get("token_type_ids")
            if types is not None:
                call["token_type_ids"] = _join(types.new_zeros(rows, total), types, where)
            assert prompt is not None
            prompt = _join(prompt.new_zeros(rows, total), prompt, where)
        positions = call.get("position_ids")
        if positions is None and stack.causal and state.rows is not None:
            positions = torch.arange(length, device=tokens.device) + max(0, done - total)
            positions = positions.expand(rows, -1)
        if positions is not None and stack.causal:
            if positions.ndim != 2:
                raise UserError(f"forward: virtual tokens need 2-D position ids, found {positions.ndim}-D")
            positions = positions + live.sum(1, keepdim=True)
            if not done:
                front = (live.cumsum(1) - 1).clamp(min=0).to(positions.dtype)
                positions = torch.cat([front, positions.expand(rows, -1)], 1)
            call["position_ids"] = positions
        elif stack.counts or positions is not None:
            if positions is None:
                positions = torch.arange(length, device=tokens.device)[None]
            positions = positions.expand(rows, -1)
            last = positions.masked_fill(~real, -1).amax(1, keepdim=True)
            behind = last + live.cumsum(1).clamp(min=1).to(positions.dtype)
            call["position_ids"] = _join(behind, positions, where)
    if done:
        state.batches[stack.path] = Batch()
        return (), call
    first = {names: total - need if stack.front else -total for names, need in needs.items()}
    slots = {names: _ranges(wanted, names, first[names]) for names in needs}
    if state.rows is None:
        state.batches[stack.path] = Batch(slots[state.active], prompt, order, lengths, total)
    else:
        state.batches[stack.path] = Batch({}, prompt, order, lengths, total, slots)
    return (), call


def release(stack: Stack, state: State, module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook of a stack: takes the reserved positions off every hidden state it returns."""
    batch = state.batches.get(stack.path)
    if batch is None or not batch.total:
        return output

    def strip(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim == 3:
            return value[:, batch.total :] if stack.front else value[:, : -batch.total]
        return tuple(strip(item) for item in value) if isinstance(value, tuple) else value

    if isinstance(output, Tensor):
        return strip(output)
    if isinstance(output, tuple):
        return (strip(output[0]), *output[1:])
    for key in ("last_hidden_state", "hidden_states"):
        if output.get(key) is not None:
            output[key] = strip(output[key])
    return output


def reserved(stack: Stack, state: State) -> Iterator[tuple[str, str, int]]:
    """(adapter, slot, tokens) of every input method with a site in this stack, in the order of attaching."""
    inside = stack.path + "." if stack.path else ""
    for adapter in state.adapters.values():
        for part in adapter.parts:
            if isinstance(part.method, InputMethod) and any(place.module.startswith(inside) for place in part.places):
                yield adapter.name, slot_name(adapter.name, part.label), part.method.virtual_tokens


def slot_name(adapter: str, label: str) -> str:
    """The key under which one part of an adapter has its reserved positions."""
    return f"{adapter}/{label}"


def follow(path: str, state: State, module: nn.Module, args: Any, kwargs: Any) -> None:
    """Forward pre-hook inside a stack, also run by an edited forward: what is recomputed in backward gets its batch.

    Several batches may wait for their backward. A checkpointed module runs again on the very tensors of its first run,
    so these carry the batch.
    """
    if torch.compiler.is_compiling():
        return
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if torch._C._current_graph_task_id() == -1:
        for value in given:
            value._trimtab_batch = state.batches.get(path)  # type: ignore[attr-defined]
    else:
        known = next((value._trimtab_batch for value in given if hasattr(value, "_trimtab_batch")), None)
        if known is not None:
            state.batches[path] = known


def see_labels(state: State, names: tuple[str, ...], module: nn.Module, args: Any, kwargs: Any) -> None:
    """Forward pre-hook of the root: token labels say where the prompt of each row ends."""
    labels = (dict(zip(names, args, strict=False)) | kwargs).get("labels")
    if isinstance(labels, Tensor) and labels.ndim == 2:
        state.prompt = prompt_mask(labels)
    elif not state.prompt_held:
        state.prompt = None


def prompt_mask(labels: Tensor) -> Tensor:
    """(rows, positions) bool: before the first trained label of a row; all of it when nothing precedes that label."""
    before = (labels != -100).cumsum(1) == 0
    return before | ~before.any(1, keepdim=True)


@contextmanager
def prompts(model: nn.Module, labels: Tensor | None) -> Iterator[None]:
    """For loops that compute their own loss: tells position-dependent methods the labels the model does not get."""
    state = model.__dict__.get("_trimtab")
    if state is None or labels is None or labels.ndim != 2:
        yield
        return
    state.prompt, state.prompt_held = prompt_mask(labels), True
    try:
        yield
    finally:
        state.prompt, state.prompt_held = None, False


@contextmanager
def packed_prompts(model: nn.Module, order: Tensor, lengths: Tensor) -> Iterator[None]:
    """For packs: tells position-dependent methods where each token stands in its row, and how long its prompt is."""
    state = model.__dict__.get("_trimtab")
    if state is None:
        yield
        return
    state.packed = (order, lengths)
    try:
        yield
    finally:
        state.packed = None


def install_hooks(model: nn.Module, state: State, paths: list[str]) -> None:
    """Put the hooks on the root and on the stacks of these module paths, once each."""
    present = {hook[0] for hook in state.hooks}
    for path in paths:
        stack = stack_of(model, path)
        if stack is None:
            continue
        if stack.path not in present:
            present.add(stack.path)
            module = model.get_submodule(stack.path)
            before = module.register_forward_pre_hook(partial(reserve, stack, state), with_kwargs=True)
            after = module.register_forward_hook(partial(release, stack, state))
            state.hooks.append((stack.path, before, after))
        for inner in inside(stack.path, path):
            if inner not in present:
                present.add(inner)
                hook = model.get_submodule(inner).register_forward_pre_hook(
                    partial(follow, stack.path, state), with_kwargs=True
                )
                state.hooks.append((inner, hook))
    names = tuple(inspect.signature(model.forward).parameters)
    if "labels" in names and "labels of the root" not in present:
        handle = model.register_forward_pre_hook(partial(see_labels, state, names), with_kwargs=True)
        state.hooks.append(("labels of the root", handle))


def inside(stack: str, path: str) -> list[str]:
    """The paths from just below a stack down to a site."""
    names = path.split(".")
    first = len(stack.split(".")) + 1 if stack else 1
    return [".".join(names[:end]) for end in range(first, len(names) + 1)]


def remove_hooks(state: State) -> None:
    """Take every hook off again."""
    for _, *handles in state.hooks:
        for handle in handles:
            handle.remove()
    state.hooks.clear()
    state.batches.clear()
    state.prompt = state.packed = None


def _join(virtual: Tensor, real: Tensor, where: str) -> Tensor:
    return torch.cat([virtual, real] if where == "front" else [real, virtual], 1)


def _beside(need: int, total: int, where: str) -> Tensor:
    """(total) bool: a row uses the reserved positions next to its real tokens, so distances are as if it were alone."""
    places = torch.arange(total)
    return places >= total - need if where == "front" else places < need


def _ranges(wanted: list[tuple[str, str, int]], names: tuple[str, ...], start: int) -> Slots:
    """The positions of each slot of these adapters, one after the other from `start`."""
    found = {}
    for name, slot, count in wanted:
        if name in names:
            found[slot] = (start, start + count)
            start += count
    return found
