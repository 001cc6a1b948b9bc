"""Closed formulas for the memory of a step, from a model's shape alone: the second way, beside the dry run.

With h the width, k the width of the keys, f that of the feed-forward, b the bytes of a value, T the tokens of a batch
(packed: no padding) and L the length of a row, backward needs per token and layer

    Llama-like   b·(5h + 2k + 2f + ranks), of which one h only where o is trained
                 + b·h where q, k or v keep their input, the same for gate and up, + b·f where down does
    GPT-2        b·(7h + 4f) and masks of dropout, and its scores where attention has dropout
    BERT-like    b·(7h + f), and scores in short rows

A low-rank method on dense weights keeps no input: the norm or the gate makes it again. On quantized weights, and where
the weight itself trains, it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from trimtab.catalog import trained_values
from trimtab.core.errors import UserError
from trimtab.core.format import Format
from trimtab.core.low_rank import LowRank
from trimtab.core.method import Placed
from trimtab.core.part import plan
from trimtab.core.registry import find
from trimtab.core.select import select
from trimtab.core.transform import Transform
from trimtab.engine.loss import CHUNK
from trimtab.engine.row_attention import SHORT

LLAMA = ("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "olmo", "olmo2", "gemma")
BERT = ("bert", "roberta", "electra", "xlm-roberta")
PROJECTIONS = frozenset({"q", "k", "v", "qkv", "o", "gate", "up", "down", "head"})
KINDS = {**dict.fromkeys(LLAMA, "llama"), "gpt2": "gpt2", **dict.fromkeys(BERT, "bert")}


@dataclass(frozen=True)
class Shape:
    """What the formulas need to know of a model."""

    kind: str
    layers: int
    width: int
    keys: int
    middle: int
    heads: int
    vocabulary: int
    dropout: float
    attention_dropout: float

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From a transformers config; an error for a family without formulas."""
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        kind = KINDS.get(text.model_type)
        if kind is None:
            raise UserError(f"no formulas for {text.model_type}", fix="the dry run counts it")
        h, a = text.hidden_size, text.num_attention_heads
        size = getattr(text, "head_dim", None) or h // a
        inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * h
        return cls(
            kind=kind,
            layers=text.num_hidden_layers,
            width=h,
            keys=(getattr(text, "num_key_value_heads", None) or a) * size,
            middle=inner,
            heads=a,
            vocabulary=text.vocab_size,
            dropout=float(getattr(text, "resid_pdrop", getattr(text, "hidden_dropout_prob", 0.0)) or 0.0),
            attention_dropout=float(
                getattr(text, "attn_pdrop", getattr(text, "attention_probs_dropout_prob", 0.0))
                or getattr(text, "attention_dropout", 0.0)
                or 0.0
            ),
        )


@dataclass(frozen=True)
class Trains:
    """Which projections train, by role: `low` keep no input on dense weights, `dense` do."""

    low: frozenset[str]
    dense: frozenset[str]
    rank: int
    values: int
    shapes: tuple[tuple[int, ...], ...] = ()

    @property
    def roles(self) -> frozenset[str]:
        return self.low | self.dense


def trains(model: nn.Module, parts: Sequence[Placed], quantized: bool) -> Trains:
    """What the parts of a method train on a model of the meta device, by the methods' own formulas."""
    low: set[str] = set()
    dense: set[str] = set()
    rank = values = 0
    for placed in parts:
        count, _ = trained_values(model, placed.method, placed.where)
        values += count
        for part in plan(model, placed.method, placed.where):
            roles = {place.role or "" for place in part.places if place.layer is not None}
            plain = isinstance(part.method, LowRank) and type(part.method).forward is LowRank.forward
            odd = roles - PROJECTIONS
            if odd:
                raise UserError(f"no formulas for what trains at {', '.join(sorted(odd))}", fix="the dry run counts it")
            method: Any = part.method
            rate: Any = getattr(method, "dropout", None)
            if not (plain or type(method) is find("full")) or rate:
                name = type(part.method).__name__
                raise UserError(f"no formulas for {name} as it is set", fix="the dry run counts it")
            (low if plain and not quantized else dense).update(roles)
            rank = max(rank, int(getattr(part.method, "rank", 0) or 0))
    return Trains(frozenset(low), frozenset(dense), rank, values)


def kept_per_layer(shape: Shape, trained: Trains, length: int, value: int) -> float:
    """Bytes per token that one layer keeps for backward."""
    h, k, f, a = shape.width, shape.keys, shape.middle, shape.heads
    into = int(bool(trained.dense & {"q", "k", "v", "qkv"}))
    between = int(bool(trained.dense & {"gate", "up"}))
    ranks = sum(16 * -(-trained.rank * len(trained.roles & group) // 16) for group in GROUPS if trained.roles)
    if shape.kind == "llama":
        values = 4 * h + 2 * k + 2 * f + ranks
        values += h * bool(trained.roles & {"o"}) + h * into + h * between + f * bool(trained.dense & {"down"})
        return value * values + 4 * a + 8
    noise = 2 * h if shape.dropout else 0
    scores = 0.0
    if shape.kind == "gpt2":
        through = h * bool(trained.roles & {"q", "k", "v"}) + h * bool(trained.roles & {"o"})
        through += h * bool(trained.roles & {"up"}) + f * bool(trained.roles & {"down"})
        core = (2 * 3 * h) if not shape.attention_dropout else 3 * h + 2 * h
        scores = length * a * (3 * value) if shape.attention_dropout else 4 * a - value * 2 * h
        return value * (2 * h + core + noise + 4 * f + through) + scores + 16
    through = ranks + h * bool(trained.roles & {"q", "k", "v"}) + h * bool(trained.roles & {"o"})
    through += h * bool(trained.roles & {"up"}) + f * bool(trained.roles & {"down"})
    through += 2 * h * (length > SHORT and shape.attention_dropout > 0)  # rows gathered for the plain attention
    matrices = 1 if not shape.attention_dropout else 2 if length <= SHORT else 3
    scores = value * matrices * length * a if length <= SHORT or shape.attention_dropout else value * h + 4 * a
    return value * (3 * h + 2 * h + noise + f + through) + scores + 16


GROUPS = (frozenset({"q", "k", "v"}), frozenset({"o"}), frozenset({"gate", "up"}), frozenset({"down"}))


@dataclass(frozen=True)
class Estimate:
    """Bytes by category, as the formulas have them."""

    live: dict[str, int]
    kept: int

    @property
    def peak(self) -> int:
        return sum(self.live.values())


def estimate(
    model: nn.Module,
    shape: Shape,
    trained: Trains,
    rule: Transform,
    *,
    rows: int,
    length: int,
    terms: int,
    value: int,
    format: Format | None,
    checkpointing: str,
    active: float = 1.0,
) -> Estimate:
    """The highest point of a step: at the loss, in the first layer that goes back, or with all gradients."""
    T, h, f = rows * length, shape.width, shape.middle
    count = sum(p.numel() for p in model.parameters())
    weights = value * count
    if format is not None:
        modules: list[Any] = [model.get_submodule(place.module) for place in select(model, "all-linear")]
        sizes = [(int(one.weight.shape[0]), int(one.weight.shape[1])) for one in modules]
        weights += sum(format.bytes(one) - value * one[0] * one[1] for one in sizes)
    master = 4
    adapter = master * trained.values
    live_share = round(active * trained.values)
    gradients = 0 if rule.in_backward else master * live_share
    per_value = rule.state_bytes((4096, 4096)) / 4096**2
    state = round(per_value * live_share)
    layer = T * kept_per_layer(shape, trained, length, value)
    ends = T * value * 2 * h + terms * value * 2 * h if shape.kind != "bert" else 3 * T * value * h
    kept: float
    again: float
    if checkpointing in ("block", "offload"):
        kept, again = shape.layers * T * value * h * (checkpointing == "block"), layer
    elif checkpointing == "sqrt":
        size = int((shape.layers - 1) ** 0.5) + 1
        kept, again = -(-shape.layers // size) * T * value * h, size * layer
    else:
        narrow = shape.kind == "bert"
        kept, again = (shape.layers - narrow) * layer, 0.0
        if narrow:
            kept += T * value * (4 * h)
    if value < 4 and checkpointing == "off":
        kept += value * trained.values  # what trains is in fp32, and its copy in the model's type is kept
    logits = 0
    if shape.kind != "bert":
        chunk = min(terms, CHUNK)
        many = terms > CHUNK
        logits = chunk * shape.vocabulary * ((4 + 4 * many) if value == 4 else 6 + 4 * many)
    rooms = 3 * T * f * value if shape.kind == "llama" else 0
    at_loss = kept + ends + logits + rooms
    back = 6 * T * f * value + 2 * T * h * value if shape.kind == "llama" else 3 * T * f * value
    going_back = kept + ends + again + back
    at_end = gradients + T * value * 2 * h + rooms
    highest = max(at_loss, going_back, at_end)
    live = dict.fromkeys(("weights", "adapter", "gradients", "optimizer", "activations", "logits", "temporary"), 0)
    live |= {"weights": weights, "adapter": adapter, "optimizer": state}
    if highest == at_end:
        live |= {"gradients": gradients, "temporary": round(at_end - gradients)}
    elif highest == at_loss:
        live |= {"activations": round(kept + ends), "logits": logits, "temporary": rooms}
    else:
        live |= {"activations": round(kept + ends), "temporary": round(again + back)}
    return Estimate(live, round(kept))
