"""Shifted sparse attention (S²-Attn, arXiv 2309.12307), registered with transformers' attention interface.

While training, a row is cut into groups and attention stays inside them. Half of the heads have their cuts half a group
later, so what one group knows reaches the next. Cost grows with the length of a row, not its square. In evaluation mode
attention is whole.

The official eager code rolls the shifted heads around, and the first half group then sees the last one, which is its
future. Here, as in the official flash-attention code, the row begins and ends with a short group instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import InputMethod
from trimtab.data.packing import Bag, Segment
from trimtab.engine.attention import attached, can_pack, replaced_attention, segment_attention

NAME = "trimtab_shifted"


def shifted_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Sequence[Segment] | Bag | None = None,
    group: int = 0,
    **options: Any,  # whatever transformers passes to every attention function
) -> tuple[Tensor, None]:
    """Attention inside groups of `group` tokens: query (rows, heads, tokens, width), key and value as many or fewer.

    Returns (rows, tokens, heads, width). The first half of the heads is cut at whole groups, the other one at half
    groups. In a pack every row has groups of its own; without `segments` every line is one row, without padding.
    """
    if not module.training:
        return segment_attention(module, query, key, value, attention_mask, scaling, dropout, segments, **options)
    if isinstance(segments, Bag) or any(segment.ancestors for segment in segments or ()):
        raise UserError("attention: shifted groups are those of one causal row", fix="packing: plain, or off")
    repeated = query.shape[1] // key.shape[1]
    if repeated > 1:  # before heads are told apart: a key may serve heads of both halves
        key, value = (one.repeat_interleave(repeated, 1) for one in (key, value))
    half = query.shape[1] // 2
    spans = [(one.start, one.stop) for one in segments] if segments else [(0, query.shape[2])]
    sides = []
    for heads, shift in ((slice(0, half), 0), (slice(half, None), group // 2)):
        q, k, v = (one[:, heads] for one in (query, key, value))
        pieces = [
            causal(q[:, :, start:stop], k[:, :, start:stop], v[:, :, start:stop], many, scaling, dropout)
            for span in spans
            for start, stop, many in cuts(*span, group, shift)
        ]
        sides.append(torch.cat(pieces, 2) if len(pieces) > 1 else pieces[0])
    return torch.cat(sides, 1).transpose(1, 2).contiguous(), None


def cuts(start: int, stop: int, group: int, shift: int) -> list[tuple[int, int, int]]:
    """(start, stop, number of equal groups) of every piece of a row: a short group, whole ones together, the rest.

    A row that one group covers is left whole.
    """
    if stop - start <= group:
        return [(start, stop, 1)]
    many = (stop - start - shift) // group
    edges = [start, start + shift, start + shift + many * group, stop]
    pieces = [(edges[0], edges[1], 1), (edges[1], edges[2], many), (edges[2], edges[3], 1)]
    return [piece for piece in pieces if piece[0] < piece[1]]


def causal(q: Tensor, k: Tensor, v: Tensor, many: int, scaling: float | None, dropout: float) -> Tensor:
    """Causal attention inside each of `many` equal groups of these tokens; all (rows, heads, tokens, width)."""
    rows = q.shape[0]
    q, k, v = (one.unflatten(2, (many, -1)).transpose(1, 2).flatten(0, 1) for one in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling)
    return y.unflatten(0, (rows, many)).transpose(1, 2).flatten(2, 3)


def can_shift(model: nn.Module, longest: int) -> bool:
    """Whether attention can be shifted in this model: where rows can be packed, without virtual tokens in front."""
    config: Any = getattr(model, "config", None)
    virtual = any(isinstance(method, InputMethod) for method in attached(model))
    return can_pack(model, longest) and not virtual and not getattr(config, "is_encoder_decoder", False)


def group_for(longest: int) -> int:
    """A quarter of the longest row, as in the paper: the next even number."""
    return max(2, 2 * -(-longest // 8))


@contextmanager
def shifted_in(model: Any, group: int) -> Iterator[None]:
    """Train the model in groups of `group` tokens inside; its own attention comes back afterwards."""
    from transformers import AttentionInterface

    if group < 2 or group % 2:
        raise UserError(f"group={group} has no half", fix=f"an even number, like {max(2, group + group % 2)}")
    name = f"{NAME}_{group}"
    AttentionInterface.register(name, partial(shifted_attention, group=group))
    with replaced_attention(model, name):
        yield
