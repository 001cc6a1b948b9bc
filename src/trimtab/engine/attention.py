"""Attention within packed rows, registered with transformers' attention interface under our name.

In a pack each segment's queries meet the keys of its ancestors and, causally, its own: no mask over the whole pack is
ever made, and the cost is that of the rows alone, less what they share. In a bag every token meets its whole row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.attach import reads_batch
from trimtab.core.attention import attention
from trimtab.core.delta import state_of
from trimtab.core.method import InputMethod, Method
from trimtab.core.positions import Ends
from trimtab.data.packing import Bag, Segment
from trimtab.engine.row_attention import row_attention

NAME = "trimtab_segments"


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Sequence[Segment] | Bag | None = None,
    **options: Any,  # whatever transformers passes to every attention function
) -> tuple[Tensor, None]:
    """Attention over one pack: query (1, heads, tokens, width), key and value with as many heads or fewer.

    Returns (1, tokens, heads, width). Without `segments` (generation, a padded batch) torch's own attention runs.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    if isinstance(segments, Bag):
        return row_attention(segments, query, key, value, scaling, dropout if module.training else 0.0), None
    segments = rooted(segments, query.shape[2])
    lengths = [segment.stop - segment.start for segment in segments]
    keys, values = (tensor.split(lengths, dim=2) for tensor in (key, value))
    grouped = query.shape[1] != key.shape[1]

    def attend(query: Tensor) -> Tensor:
        outputs = []
        for index, (segment, q) in enumerate(zip(segments, query.split(lengths, dim=2), strict=True)):
            k, v, mask = keys[index], values[index], None
            if segment.ancestors:
                k = torch.cat([*(keys[above] for above in segment.ancestors), k], 2)
                v = torch.cat([*(values[above] for above in segment.ancestors), v], 2)
                mask = causal_after(lengths[index], k.shape[2], query.device)
            y = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout if module.training else 0.0,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=grouped,
            )
            outputs.append(y)
        return torch.cat(outputs, 2)

    return attention(query, attend, scaling).transpose(1, 2).contiguous(), None


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
    return plain_attention(model, longest + virtual) and ends is not None and not (virtual and ends)


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
    return not capped and kinds <= {"full_attention", "sliding_attention"} and window >= longest


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
def segments_in(model: Any) -> Iterator[None]:
    """Run the model with segment attention inside; its own attention comes back afterwards."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, segment_attention)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
