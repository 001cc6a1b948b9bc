"""A small decoder in plain torch, with what language models have today: rotary positions, grouped keys, a cache.

It is the laws' own host for methods that need a model around their sites: virtual tokens, edits at prompt positions,
and defaults such as "attn, ffn". Nothing in it knows of Trimtab.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn


@dataclass
class Cache:
    """Keys and values of the positions that were seen, one entry a layer."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def get_seq_length(self) -> int:
        return self.keys[0].shape[2] if self.keys else 0

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append to one layer; returns all of its keys and values."""
        if layer == len(self.keys):
            self.keys.append(k)
            self.values.append(v)
        else:
            self.keys[layer] = torch.cat([self.keys[layer], k], 2)
            self.values[layer] = torch.cat([self.values[layer], v], 2)
        return self.keys[layer], self.values[layer]


def rotate(x: Tensor, positions: Tensor, theta: float = 100.0) -> Tensor:
    """Rotary embedding of x (rows, heads, positions, size): i turns with i + size/2, by position·theta^(-2i/size)."""
    half = x.shape[-1] // 2
    speed = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = (positions[:, None, :, None].double() * speed).to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)


class Attention(nn.Module):
    """Causal attention with fewer key heads than query heads."""

    def __init__(self, width: int, heads: int, key_heads: int, layer: int) -> None:
        super().__init__()
        self.heads, self.key_heads, self.layer = heads, key_heads, layer
        size = width // heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, key_heads * size)
        self.v_proj = nn.Linear(width, key_heads * size)
        self.o_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, allowed: Tensor, positions: Tensor, cache: Cache | None) -> Tensor:
        rows, length = x.shape[:2]
        q = rotate(self.q_proj(x).view(rows, length, self.heads, -1).transpose(1, 2), positions)
        k = rotate(self.k_proj(x).view(rows, length, self.key_heads, -1).transpose(1, 2), positions)
        v = self.v_proj(x).view(rows, length, self.key_heads, -1).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        group = self.heads // self.key_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        hidden = torch.zeros(allowed.shape, dtype=q.dtype, device=q.device)
        hidden = hidden.masked_fill(~allowed, torch.finfo(q.dtype).min)  # a query that sees nothing stays a number
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, hidden).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linears around a GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, inner)
        self.down_proj = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))


class Block(nn.Module):
    """A pre-norm layer."""

    def __init__(self, width: int, inner: int, heads: int, key_heads: int, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.self_attn = Attention(width, heads, key_heads, layer)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = FeedForward(width, inner)

    def forward(self, x: Tensor, allowed: Tensor, positions: Tensor, cache: Cache | None) -> Tensor:
        x = x + self.self_attn(self.attention_norm(x), allowed, positions, cache)
        return x + self.mlp(self.mlp_norm(x))


class Stack(nn.Module):
    """From ids to hidden states. `checkpointing` recomputes every block in backward."""

    def __init__(self, vocabulary: int, width: int, inner: int, layers: int, heads: int, key_heads: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width, inner, heads, key_heads, layer) for layer in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.checkpointing = False

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        done = past_key_values.get_seq_length() if past_key_values is not None else 0
        length = input_ids.shape[1]
        places = torch.arange(done + length, device=input_ids.device)
        allowed = (places[None, :] <= places[done:, None])[None, None]
        if attention_mask is not None:
            allowed = allowed & attention_mask[:, None, None, :].bool()
        positions = places[None, done:] if position_ids is None else position_ids
        x = self.embed_tokens(input_ids)
        for block in self.layers:
            if self.checkpointing and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, allowed, positions, None, use_reentrant=False)
            else:
                x = block(x, allowed, positions, past_key_values)
        return self.norm(x)


class Decoder(nn.Module):
    """Logits (rows, positions, vocabulary) of ids (rows, positions). `labels` are seen by adapters; no loss is made."""

    def __init__(
        self,
        vocabulary: int = 29,
        width: int = 24,
        inner: int = 40,
        layers: int = 2,
        heads: int = 4,
        key_heads: int = 2,
    ) -> None:
        super().__init__()
        self.model = Stack(vocabulary, width, inner, layers, heads, key_heads)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        return self.lm_head(self.model(input_ids, attention_mask, position_ids, past_key_values))
