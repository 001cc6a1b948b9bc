"""What stands in on the meta device for what a run decides by trial, asks of values, or would do slowly there."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental import _config as experimental

from trimtab.core import code, scratch
from trimtab.core.attention import attention as through_edits
from trimtab.core.format import Format
from trimtab.core.modes import evaluating
from trimtab.core.swap import swap_alike
from trimtab.engine.faster import quick_gate, quick_norm
from trimtab.engine.loss import Batch
from trimtab.plan.live import Live
from trimtab.train.recipe import Recipe


@contextmanager
def standing(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another attribute of a module or a class inside."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


@contextmanager
def on_meta(model: Any, recipe: Recipe, batch: Batch) -> Iterator[None]:
    """Decide on small copies with numbers what the engine decides by trial, and run attention as a CPU does."""
    scratch.release()
    if recipe.faster:
        for module in list(model.modules()):
            quicken(module)
    try:
        with standing_in(whole=not isinstance(batch, dict) or unpadded(batch)), counted_whole():
            model.__dict__["_trimtab_ends_with_head"] = hands_on_logits(model)
            yield
    finally:
        scratch.release()


def quicken(module: nn.Module) -> None:
    """Give a norm or a gated feed-forward on the meta device its fast class, if a small copy of it gets one."""
    w = module._parameters.get("weight")
    if w is not None and w.ndim == 1 and w.is_meta and not w.requires_grad and not module._modules:
        twin = copy.copy(module)
        twin.__dict__ = {**module.__dict__, "_parameters": {**module._parameters}}
        twin._parameters["weight"] = nn.Parameter(torch.linspace(0.5, 1.5, len(w), dtype=w.dtype), requires_grad=False)
        if quick_norm(twin):
            swap_alike(module, twin)
    elif {"gate_proj", "up_proj", "down_proj"} <= set(module._modules) and not module._parameters:
        if "delta" in module._modules:
            return
        twin = copy.copy(module)
        twin.__dict__ = {**module.__dict__, "_modules": {**module._modules}}
        small = {"gate_proj": (32, 16), "up_proj": (32, 16), "down_proj": (16, 32)}
        for name, (out, into) in small.items():
            layer = nn.Linear(into, out, bias=False)
            with torch.no_grad():
                layer.weight.copy_(torch.linspace(-1, 1, out * into).sin().view(out, into))
            layer.requires_grad_(False)
            twin._modules[name] = layer
        if quick_gate(twin):
            swap_alike(module, twin)


@torch.no_grad()
def hands_on_logits(model: Any) -> bool:
    """Whether the logits are the very tensor that the output matrix returns."""
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if head is None or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    made: list[Tensor] = []
    handle = head.register_forward_hook(lambda module, args, output: made.append(output))
    try:
        with evaluating(model):
            logits = model(input_ids=torch.tensor([[1, 2, 3]], device="meta"), use_cache=False).logits
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
    finally:
        handle.remove()
    return len(made) == 1 and logits is made[0]


def counted_whole() -> AbstractContextManager[None]:
    """Where a mask without values picks rows, all of them are picked: a bit more than of the real batch."""
    known, settings = "meta_nonzero_assume_all_nonzero", cast("Any", experimental)
    return settings.patch(**{known: True}) if hasattr(settings, known) else nullcontext()


def unpadded(batch: dict[str, Tensor]) -> bool:
    """Whether every row of a padded batch is of one length."""
    masks = [value for key, value in batch.items() if key.endswith("attention_mask")]
    return all(bool(mask.all()) for mask in masks)


@contextmanager
def standing_in(whole: bool) -> Iterator[None]:
    """On the meta device: attention by the kernel that a CPU takes, and an answer where a mask is asked if it is whole.

    Models leave a mask out when nothing is padded, and ask the mask itself, which has no values here. A function mode
    would not reach what checkpointing runs again.
    """
    plain, truth = F.scaled_dot_product_attention, Tensor.__bool__

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        kernel = flash if query.is_meta else plain

        def run(q: Tensor) -> Tensor:
            return kernel(q, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

        return through_edits(query, run, scale) if query.is_meta else run(query)

    def answer(self: Tensor) -> bool:
        return whole if self.is_meta else truth(self)

    with standing(F, "scaled_dot_product_attention", attention), standing(Tensor, "__bool__", answer):
        yield


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Flash attention's output and what it keeps; under dropout a CPU takes the plain way, with all scores."""
    if dropout_p > 0:
        plain = torch.ops.aten._scaled_dot_product_attention_math
        return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)[0]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
    made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )
    out: Tensor = made[0]
    return out


@contextmanager
def encoded_once(format: Format | None) -> Iterator[None]:
    """Encode one weight of each shape: on the meta device the others would come to the same sizes, slowly."""
    if format is None:
        yield
        return
    cls, plain = type(format), type(format).encode
    known: dict[Any, dict[str, Tensor]] = {}

    def encode(self: Any, W: Tensor) -> dict[str, Tensor]:
        key = (self, W.shape, W.dtype)
        if not W.is_meta:
            return plain(self, W)
        if key not in known:
            known[key] = plain(self, W)
        return {name: torch.empty_like(tensor) for name, tensor in known[key].items()}

    with standing(cls, "encode", encode):
        yield


@contextmanager
def decoded_once() -> Iterator[None]:
    """Decode one weight of each kind as its format does, the others by what that one needed on the way."""
    plain = code._decoded
    known: dict[str, tuple[int, torch.dtype]] = {}

    def decoded(tensors: Sequence[Tensor], key: str) -> Tensor:
        if not tensors[0].is_meta:
            return plain(tensors, key)
        if key not in known:
            with Live() as inner:
                W = plain(tensors, key)
            known[key] = (max(0, inner.peak - W.nbytes), W.dtype)
            return W
        extra, dtype = known[key]
        room = torch.empty(extra, dtype=torch.uint8, device="meta")
        W = torch.empty(code._recipe(key).shape, dtype=dtype, device="meta")
        del room
        return W

    with standing(code, "_decoded", decoded):
        yield
