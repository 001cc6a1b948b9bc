"""Attention over a whole pack in one call, where a GPU has it: torch's attention for rows of varying length.

A segment's queries meet the keys of its ancestors, then its own, causally. Listed segment after segment these keys are
rows of their own, and the kernel (FlashAttention) lines its causal mask up with the last key of each: one call computes
what `trimtab.engine.attention` does segment by segment. It is for bfloat16 and float16 on NVIDIA GPUs from Ampere on,
without dropout and sinks; elsewhere nothing changes. No GPU was at hand: tests put its definition in its place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from trimtab.data.packing import Segment

AMPERE = (8, 0)
WIDEST = 256
"""Largest width of a head that the kernel takes; it has to be a multiple of 8."""
NEEDED = {"window_size", "scale", "enable_gqa"}
"""What the kernel's function has to take: older releases of torch do not have all of it."""


@cache
def kernel() -> Callable[..., Any] | None:
    """torch's `varlen_attn`, None in releases without it or with less of it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if set(inspect.signature(varlen_attn).parameters) >= NEEDED else None


def in_one_call(query: Tensor) -> bool:
    """Whether the kernel takes queries (1, heads, tokens, width) like these, on the device they are on."""
    half, width = query.dtype in (torch.bfloat16, torch.float16), query.shape[3]
    if not query.is_cuda or torch.version.hip is not None or not half or width > WIDEST or width % 8:
        return False
    return torch.cuda.get_device_capability(query.device) >= AMPERE and kernel() is not None


@dataclass(frozen=True)
class Layout:
    """The keys of a pack's segments, one after the other."""

    sources: Tensor
    """(keys,): the token of each."""
    starts: Tensor
    """(segments + 1,), int32: where the queries of each begin."""
    key_starts: Tensor
    """(segments + 1,), int32: where the keys of each begin."""
    longest: int
    longest_keys: int


@lru_cache(maxsize=2)
def layout(segments: tuple[Segment, ...], device: torch.device) -> Layout:
    """Where keys and queries of a pack are; made once for all layers."""
    met = [[*(segments[above] for above in one.ancestors), one] for one in segments]
    spans = [torch.arange(part.start, part.stop) for parts in met for part in parts]
    lengths = [one.stop - one.start for one in segments]
    keys = [sum(part.stop - part.start for part in parts) for parts in met]
    starts, key_starts = (
        torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device) for counts in (lengths, keys)
    )
    return Layout(torch.cat(spans).to(device), starts, key_starts, max(lengths), max(keys))


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], scaling: float | None
) -> Tensor:
    """Attention of a pack; query (1, heads, tokens, width), key and value with as many heads or fewer; as query."""
    attend, at = kernel(), layout(tuple(segments), query.device)
    assert attend is not None
    q = query[0].transpose(0, 1).contiguous()  # (tokens, heads, width)
    k, v = (one[0].transpose(0, 1).index_select(0, at.sources) for one in (key, value))
    y = attend(
        q,
        k,
        v,
        at.starts,
        at.key_starts,
        at.longest,
        at.longest_keys,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return y.transpose(0, 1)[None]
