"""Attention within packed rows, registered with transformers' attention interface under our name.

In a pack each segment's queries meet the keys of its ancestors and, causally, its own: no mask over the whole pack is
ever made, and the cost is that of the rows alone, less what they share. In a bag every token meets its whole row.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.attach import reads_batch
from trimtab.core.attention import attention
from trimtab.core.errors import UserError, listing
from trimtab.core.method import InputMethod, Method
from trimtab.core.positions import Ends
from trimtab.core.state import state_of
from trimtab.core.swap import original
from trimtab.data.packing import Bag, Segment
from trimtab.engine.row_attention import row_attention
from trimtab.engine.varlen import in_one_call, varlen_attention

NAME = "trimtab_segments"
NOT_PLAIN = ("softcap", "position_bias")
"""Options of transformers' attention functions that change scores, which ours have not."""
_packed: list[str] = []
"""The classes of models that run on packed rows at this moment."""


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Sequence[Segment] | Bag | None = None,
    s_aux: Tensor | None = None,
    varlen: bool = True,
    **options: Any,  # whatever transformers passes to every attention function
) -> tuple[Tensor, None]:
    """Attention over one pack: query (1, heads, tokens, width), key and value with as many heads or fewer.

    `s_aux` (heads) are scores of a key that every query meets and that has no value: a sink. Returns (1, tokens, heads,
    width). Without `segments` (generation, a padded batch) torch's own attention runs. With `varlen` a pack is one call
    where a GPU has that.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    odd = [name for name in NOT_PLAIN if options.get(name) is not None]
    odd += ["s_aux"] if isinstance(segments, Bag) and s_aux is not None else []
    if odd or (segments is None and _packed):
        why = f"has {listing(odd)}" if odd else "was not told where rows end"
        raise UserError(f"forward: {type(module).__name__}, on packed rows, {why}", fix="packing: off")
    rate, grouped = dropout if module.training else 0.0, query.shape[1] != key.shape[1]
    if segments is None and s_aux is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    if isinstance(segments, Bag):
        return row_attention(segments, query, key, value, scaling, rate), None

    def found(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if s_aux is not None:
            k, v, mask = with_sink(q, k, v, mask, s_aux)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=rate, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )

    def attend(query: Tensor) -> Tensor:
        if segments is None:
            return found(query, key, value, attention_mask)
        if varlen and not rate and s_aux is None and in_one_call(query):
            return varlen_attention(query, key, value, spans, scaling)
        outputs = []
        for index, (segment, q) in enumerate(zip(spans, query.split(lengths, dim=2), strict=True)):
            k, v, mask = keys[index], values[index], None
            if segment.ancestors:
                k = torch.cat([*(keys[above] for above in segment.ancestors), k], 2)
                v = torch.cat([*(values[above] for above in segment.ancestors), v], 2)
                mask = causal_after(lengths[index], k.shape[2], query.device)
            outputs.append(found(q, k, v, mask))
        return torch.cat(outputs, 2)

    spans = rooted(segments, query.shape[2]) if segments is not None else ()
    lengths = [segment.stop - segment.start for segment in spans]
    keys, values = (tensor.split(lengths, dim=2) if spans else () for tensor in (key, value))
    return attention(query, attend, scaling).transpose(1, 2).contiguous(), None


def with_sink(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values with a key of score `sinks` (heads) and no value in front, and the additive mask that says so."""
    seen = causal_after(q.shape[2], k.shape[2], q.device) if mask is None else mask
    scores = seen.to(q.dtype) if seen.is_floating_point() else q.new_zeros(seen.shape).masked_fill(~seen, -torch.inf)
    scores = scores.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    front = sinks.to(q.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
    k, v = (F.pad(one, (0, 0, 1, 0)) for one in (k, v))
    return k, v, torch.cat([front, scores], 3)


def rooted(segments: Sequence[Segment], tokens: int) -> Sequence[Segment]:
    """The segments of a pack behind the virtual tokens that adapters reserve in front: these begin every row."""
    reserved = tokens - segments[-1].stop
    if not reserved:
        return segments
    behind = [
        Segment(one.start + reserved, one.stop + reserved, (0, *(above + 1 for above in one.ancestors)))
        for one in segments
    ]
    return [Segment(0, reserved), *behind]


def causal_after(queries: int, keys: int, device: torch.device) -> Tensor:
    """(queries, keys) bool: the last `queries` of `keys` positions see everything up to themselves."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def can_pack(model: nn.Module, longest: int) -> bool:
    """Whether packing is exact for this model: a causal one on transformers' attention interface, plain softmax.

    Virtual tokens stand once, in front of the pack. Not packed: sliding windows shorter than a row, capped scores,
    state-space layers, and adapters that read positions of a padded batch without saying which ends of the prompt they
    edit, or that edit them beside virtual tokens.
    """
    methods, ends = attached(model), edited_ends(model)
    virtual = sum(method.virtual_tokens for method in methods if isinstance(method, InputMethod))
    says = {bool(module.is_causal) for module in model.modules() if hasattr(module, "is_causal")}
    plain = plain_attention(model, longest + virtual) and says != {False}
    return plain and ends is not None and not (virtual and ends)


def plain_attention(model: nn.Module, longest: int) -> bool:
    """Whether every token of rows this long meets its whole row, by attention functions that can be replaced."""
    config: Any = getattr(model, "config", None)
    if config is None or not getattr(model, "_supports_attention_backend", False):
        return False
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    window = getattr(text, "sliding_window", None)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    capped = getattr(text, "attn_logit_softcapping", None)
    window = min(filter(None, (window, getattr(text, "local_attention", None))), default=longest)
    known = not capped and kinds <= {"full_attention", "sliding_attention"} and window >= longest
    return known and hands_on(model)


def hands_on(model: nn.Module) -> bool:
    """Whether what a forward is given beyond its own arguments reaches the model's attentions."""
    within = [path for path, module in model.named_modules() if on_interface(original(type(module)))]
    above = {path[:end] for path in within for end, sign in enumerate(path) if sign == "."} | {"", *within}
    passing = [original(type(model.get_submodule(path))) for path in above]
    return bool(within) and all(hands_keywords_on(cls) for cls in passing if cls is not nn.ModuleList)


def code_of(cls: type) -> Any:
    """The code of a class's forward below its decorators, None where it is not Python's."""
    return getattr(inspect.unwrap(cls.forward), "__code__", None)  # type: ignore[attr-defined]


@cache
def on_interface(cls: type) -> bool:
    """Whether a forward asks transformers for its attention function."""
    code = code_of(cls)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


@cache
def hands_keywords_on(cls: type) -> bool:
    """Whether a forward takes keywords that it does not name, and does something with them."""
    code = code_of(cls)
    if code is None or not code.co_flags & inspect.CO_VARKEYWORDS:
        return False
    rest = code.co_varnames[code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)]
    loads = (step.argval for step in dis.get_instructions(code) if step.opname.startswith("LOAD"))
    return any(rest in (found if isinstance(found, tuple) else (found,)) for found in loads)


def reads_positions(model: nn.Module) -> bool:
    """Whether an attached method reserves or reads positions of a padded batch."""
    return any(reads_batch(method) for method in attached(model))


def edited_ends(model: nn.Module) -> tuple[Ends, ...] | None:
    """The ends of the prompt that attached methods edit; None where one of them needs rows of their own."""
    found: list[Ends] = []
    for method in attached(model):
        if isinstance(method, InputMethod) or not reads_batch(method):
            continue
        ends = getattr(method, "ends", None)
        if ends is None:
            return None
        found += ends
    return tuple(dict.fromkeys(found))


def attached(model: nn.Module) -> list[Method]:
    """The methods of every adapter on a model."""
    state = state_of(model)
    return [part.method for adapter in state.adapters.values() for part in adapter.parts] if state else []


@contextmanager
def segments_in(model: Any, varlen: bool = True) -> Iterator[None]:
    """Run the model with segment attention inside, in one call where a GPU has it unless told otherwise; its own
    attention comes back afterwards."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, segment_attention if varlen else partial(segment_attention, varlen=False))
    with replaced_attention(model, NAME):
        yield


@contextmanager
def replaced_attention(model: Any, name: str) -> Iterator[None]:
    """Run the model with a registered attention function, which has to hear of it when the rows are packed."""

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("segments") is not None:
            _packed.append(type(module).__name__)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        _packed.clear()

    own = model.config._attn_implementation
    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, always_call=True),
    ]
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(own)
        for hook in hooks:
            hook.remove()
