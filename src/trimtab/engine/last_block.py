"""The last block of a causal model, past whose attention only the tokens that the loss reads go on.

Nothing meets the other tokens any more: their output projection and feed-forward, a prompt's for the most part, are not
computed, and backward does not go through them. In place of their results stand zeros, which nobody reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.delta import Delta
from trimtab.core.errors import UserError
from trimtab.core.select import select
from trimtab.core.site import is_conv1d
from trimtab.core.swap import swap
from trimtab.data.packing import Segments

ROLES = ("o", "down")
PARTS = "_trimtab_parts"
"""Where a swapped block keeps its token-wise parts."""
EXACT = 1e-5
MOST = 0.75
"""Share of tokens that are read above which picking them out costs more than it spares."""


def quick_last(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Swap the last block for one that narrows its token-wise parts to what is read; what was swapped, by path."""
    config: Any = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return []
    try:
        block = select(model, "block")[-1].module
        output, down = ([one for one in select(model, role) if one.module.startswith(f"{block}.")] for role in ROLES)
    except UserError:
        return []
    if len(output) != 1 or len(down) != 1:
        return []
    feed_forward = ".".join(down[0].module.split(".")[: block.count(".") + 2])
    last = model.get_submodule(block)
    parts = [model.get_submodule(output[0].module), model.get_submodule(feed_forward)]
    if parts[0] in parts[1].modules() or not all(edits_weights(part) and token_wise(part) for part in parts):
        return []
    beside = [
        child for name, child in last.named_children() if name != "delta" and not set(child.modules()) & set(parts)
    ]
    if any(one.ndim > 1 for child in beside for one in child.parameters()):  # more than norms: tokens may meet there
        return []
    swap(last, last_namespace)
    last.__dict__[PARTS] = parts
    return [(block, last)]


def edits_weights(part: nn.Module) -> bool:
    """Whether whatever is attached here edits weights: an edit of activations may go by a token's place."""
    deltas = [one for one in part.modules() if isinstance(one, Delta)]
    return all(one.method.space == "weight" and not one.method.source for one in deltas)


@torch.no_grad()
def token_wise(part: nn.Module) -> bool:
    """Whether a module gives each token of (1, tokens, width) its result alone: told by trying, on meta by shapes."""
    W = next(part.parameters(), None)
    if W is None or not W.is_floating_point():
        return False
    inside = (one for one in part.modules() if isinstance(one, nn.Linear) or is_conv1d(one))
    layer: Any = part if isinstance(part, nn.Linear) or is_conv1d(part) else next(inside, None)
    if layer is None:
        return False
    width = layer.weight.shape[0] if is_conv1d(layer) else layer.in_features
    x = torch.linspace(-3, 3, 4 * width, device=W.device).sin().view(1, 4, width).to(W.dtype)
    few, training = torch.tensor([1, 3], device=W.device), part.training
    part.eval()
    try:
        whole, narrow = part(x), part(x[:, few])
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False
    finally:
        part.train(training)
    if not isinstance(whole, Tensor) or not isinstance(narrow, Tensor) or whole.shape[:2] != x.shape[:2]:
        return False
    if W.is_meta:
        return True
    apart = (whole[:, few] - narrow).abs().max()
    return bool(apart <= max(EXACT, 8 * torch.finfo(W.dtype).eps) * whole.abs().max())


def last_namespace(cls: type) -> dict[str, Any]:
    """Namespace of a block whose parts see the read tokens of a pack only."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        segments = kwargs.get("segments")
        if not isinstance(segments, Segments) or len(segments.read) > MOST * segments[-1].stop:
            return cls.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        handles = [handle for part in self.__dict__[PARTS] for handle in narrowed(part, segments)]
        try:
            return cls.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        finally:
            for handle in handles:
                handle.remove()

    return {"forward": forward}


def narrowed(part: nn.Module, segments: Segments) -> list[Any]:
    """Hooks by which a module computes the tokens that are read, and zeros stand in place of the others."""
    found: dict[str, Any] = {}

    def take(module: nn.Module, args: Any) -> Any:
        x: Tensor = args[0]
        found["tokens"] = x.shape[1]
        found["read"] = segments.read.to(x.device) + (x.shape[1] - segments[-1].stop)  # virtual tokens come first
        return (x.index_select(1, found["read"]), *args[1:])

    def put(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        return y.new_zeros(y.shape[0], found["tokens"], y.shape[2]).index_copy(1, found["read"], y)

    return [part.register_forward_pre_hook(take), part.register_forward_hook(put)]
