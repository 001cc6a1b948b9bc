"""What a model makes of the first tokens of some text: where a prefix that is trained directly may start."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError, listing
from trimtab.core.modes import evaluating
from trimtab.core.select import select
from trimtab.core.site import Site

FIRST = 128
"""Tokens that are looked at, unless the first row is longer."""
STARTS = ("random", "rows", "text")


def activations(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    where: str = "k, v",
    *,
    loss: Callable[[nn.Module, Mapping[str, Any]], object] | None = None,
) -> dict[str, Tensor]:
    """What matched modules give for the first tokens, one row after the other, as {site name: (tokens, out) fp32}.

    Rows are taken until there are 128 tokens. Positions that the attention mask excludes are left out, dropout is off.
    `loss(model, batch)` runs the model; it defaults to `model(**batch)`. Errors: no batch; a place that none reaches.
    """
    places = select(model, where)
    found: dict[str, list[Tensor]] = {place.module: [] for place in places}
    real: list[Tensor | None] = [None]

    def note(path: str, output: Any) -> None:
        y = (output[0] if isinstance(output, tuple) else output).detach()
        mask = real[0]
        masked = mask is not None and mask.shape == y.shape[:-1]
        found[path].append((y[mask] if masked else y.flatten(0, -2)).float())

    hooks = [
        model.get_submodule(path).register_forward_hook(lambda module, args, output, path=path: note(path, output))
        for path in found
    ]
    try:
        with evaluating(model):
            for batch in batches:
                mask = batch.get("attention_mask")
                real[0] = mask.bool() if mask is not None else None
                with torch.no_grad():
                    model(**batch) if loss is None else loss(model, batch)
                if all(sum(map(len, parts)) >= FIRST for parts in found.values()):
                    break
    finally:
        for hook in hooks:
            hook.remove()
    silent = [path for path, parts in found.items() if not parts]
    if silent:
        raise UserError(f"activations: nothing came out of {listing(silent, 4)}", fix="pass some training rows")
    whole = {path: torch.cat(parts) for path, parts in found.items()}
    return {
        place.name: whole[place.module] if place.rows is None else place.rows.of(whole[place.module]).clone()
        for place in places
    }


def statistic_of(method: Any) -> str | None:
    """What the `start` of a prefix needs measured; refuses settings that do not go together."""
    name = type(method).__name__
    if method.start not in STARTS:
        raise UserError(f"{name}: start={method.start!r}", fix=f"one of {', '.join(STARTS)}")
    if (method.start == "text") != bool(method.text or method.tokens):
        raise UserError(f"{name}: `text` or `tokens` belong to start='text', and it needs one of them")
    return None if method.start == "random" else "activations"


def started(site: Site, length: int) -> Tensor:
    """P (length, out): N(0, 0.02²), or what was measured, from its beginning again where it is shorter."""
    measured = site.statistics.get("activations")
    if measured is None:
        return 0.02 * torch.randn(length, site.out_features)
    return measured[torch.arange(length, device=measured.device) % len(measured)].clone()
