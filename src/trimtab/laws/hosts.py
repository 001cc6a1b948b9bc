"""The host zoo: one tiny model for every kind of place a method can be put at.

Sizes are chosen to tell things apart: 13 positions divide no weight, 24 and 40 inputs take groups of 4, and out, in and
vocabulary differ. A host of a method's own is `Host("mine", "linear", build, inputs, where="layer")`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.laws.decoder import Decoder

TOKENS = 13
"""Positions of every sequence; a prime that divides no weight's size."""
ROWS = 4


@dataclass(frozen=True)
class Host:
    """A tiny model with one kind of site.

    `build()` is called under a fixed seed; `inputs(rows)` gives keyword arguments whose first axis is the batch.
    """

    name: str
    kind: str
    """linear, embedding, conv, norm, raw, experts, opaque; or `model`, with the method's own `where`."""
    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]
    where: str | None = None
    """Sites, in the `where` language; None takes the method's default ones."""
    coded: Sequence[str] = ()
    """Paths of the layers a storage format is put on, or `all-linear`; none means floating storage only."""
    output: Callable[[Any], Tensor] = lambda result: result
    """What a forward returns, as one tensor."""
    thorough: bool = False
    """Whether the slower laws (compiling, recovering a target) run here too."""


class Alone(nn.Module):
    """One layer as a model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


class LookAlikeConv1D(nn.Module):
    """Stands for GPT-2's Conv1D, weight (in, out), where transformers is not there."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.2)
        self.bias = nn.Parameter(torch.randn(nf) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


LookAlikeConv1D.__name__ = LookAlikeConv1D.__qualname__ = "Conv1D"
Conv1D = LookAlikeConv1D
"""The name under which its instances pickle."""


def conv1d() -> nn.Module:
    """A biased Conv1D, (24, 20)."""
    try:
        from transformers.pytorch_utils import Conv1D as Real
    except ImportError:
        return LookAlikeConv1D(20, 24)
    layer = Real(20, 24)
    with torch.no_grad():
        layer.weight.normal_(std=0.2)
        layer.bias.normal_(std=0.2)
    return layer


class FusedAttention(nn.Module):
    """Self-attention whose q, k and v are the thirds of one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, 6)).transpose(1, 2) for part in self.c_attn(x).chunk(3, -1))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class HeadedAttention(nn.Module):
    """Self-attention whose one projection has q, k and v of every head side by side, named and told as in GPT-NeoX."""

    def __init__(self) -> None:
        super().__init__()
        self.query_key_value, self.dense = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query_key_value(x).unflatten(-1, (4, 3, 6)).permute(3, 0, 2, 1, 4)
        return self.dense(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class HeadedBlock(nn.Module):
    """What puts that attention where its family's table looks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = HeadedAttention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x)


class Headed(nn.Module):
    """A model of that one block, with the configuration by which its family is known."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="gpt_neox", num_attention_heads=4, hidden_size=24)
        self.layers = nn.ModuleList([HeadedBlock()])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


class TorchAttention(nn.Module):
    """torch's own attention, which reads its weights without calling a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(24, 4, batch_first=True)
        with torch.no_grad():
            self.attn.in_proj_bias.normal_(std=0.2)
            self.attn.out_proj.bias.normal_(std=0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


class Experts(nn.Module):
    """Stacked expert matrices (experts, out, in), the first with biases, all of them used for every token."""

    is_concatenated = True

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 32, 24) * 0.3)
        self.gate_up_proj_bias = nn.Parameter(torch.randn(3, 32) * 0.3)
        self.down_proj = nn.Parameter(torch.randn(3, 24, 16) * 0.3)

    def forward(self, x: Tensor, share: Tensor) -> Tensor:
        both = torch.einsum("bti,eoi->ebto", x, self.gate_up_proj) + self.gate_up_proj_bias[:, None, None]
        gate, up = both.chunk(2, -1)
        y = torch.einsum("ebti,eoi->ebto", F.silu(gate) * up, self.down_proj)
        return torch.einsum("ebto,bte->bto", y, share)


class ExpertBlock(nn.Module):
    """A routed mixture of experts with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router, self.experts = nn.LayerNorm(24), nn.Linear(24, 3), Experts()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.experts(h, torch.softmax(self.router(h), -1))


class PairBlock(nn.Module):
    """A residual feed-forward block that returns a tuple, as many model families do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up_proj, self.down_proj = nn.LayerNorm(24), nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, str]:
        return hidden_states + self.down_proj(F.gelu(self.up_proj(self.norm(hidden_states)))), "kept"


class Chain(nn.Module):
    """A list of blocks run one after the other, each one's first output going on."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            out = block(x)
            if isinstance(out, tuple):
                x, rest = out
                assert rest == "kept", "the block's other outputs did not come through"
            else:
                x = out
        return x


def sequential_block() -> nn.Module:
    """A block that is an nn.Sequential: whatever is added to it must not become a step of it."""
    return nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24))


def hidden(rows: int) -> dict[str, Tensor]:
    """Activations x (rows, positions, 24)."""
    return {"x": torch.randn(rows, TOKENS, 24)}


def ids(rows: int) -> dict[str, Tensor]:
    """Token ids x (rows, positions)."""
    return {"x": torch.randint(0, 29, (rows, TOKENS))}


def image(rows: int) -> dict[str, Tensor]:
    """x (rows, 4 channels, 13, 3)."""
    return {"x": torch.randn(rows, 4, TOKENS, 3)}


def text(rows: int) -> dict[str, Tensor]:
    """Ids with a padding mask; the first row starts with two padded positions."""
    mask = torch.ones(rows, TOKENS, dtype=torch.long)
    mask[0, :2] = 0
    return {"input_ids": torch.randint(1, 29, (rows, TOKENS)), "attention_mask": mask}


@cache
def zoo() -> tuple[Host, ...]:
    """All hosts, by name, in the order in which laws go over them."""
    layer = ("layer",)
    return (
        Host("linear", "linear", lambda: Alone(nn.Linear(24, 20)), hidden, "layer", layer, thorough=True),
        Host("unbiased", "linear", lambda: Alone(nn.Linear(24, 20, bias=False)), hidden, "layer", layer),
        Host("conv1d", "linear", lambda: Alone(conv1d()), hidden, "layer", layer),
        Host("slice", "linear", lambda: Alone(FusedAttention()), hidden, "v", ("layer.c_attn",), thorough=True),
        Host("heads", "linear", Headed, hidden, "v"),
        Host("embedding", "embedding", lambda: Alone(nn.Embedding(29, 24)), ids, "layer", thorough=True),
        Host("conv2d", "conv", lambda: Alone(nn.Conv2d(4, 20, 3, padding=1)), image, "layer", thorough=True),
        Host("grouped", "conv", lambda: Alone(nn.Conv2d(4, 20, 3, padding=1, groups=2)), image, "layer"),
        Host("layernorm", "norm", lambda: Alone(nn.LayerNorm(24)), hidden, "layer", thorough=True),
        Host("rmsnorm", "norm", lambda: Alone(nn.RMSNorm(24, eps=1e-6)), hidden, "layer"),
        Host("attention", "raw", TorchAttention, hidden, "qkv, o"),
        Host("attention_v", "raw", TorchAttention, hidden, "v"),
        Host("experts", "experts", lambda: Chain(ExpertBlock()), hidden, "expert_up, expert_down"),
        Host("block", "opaque", lambda: Chain(PairBlock(), PairBlock()), hidden, "block", thorough=True),
        Host("sequential", "opaque", lambda: Chain(sequential_block(), sequential_block()), hidden, "block"),
        Host("decoder", "model", Decoder, text, None, ("all-linear",), thorough=True),
    )
