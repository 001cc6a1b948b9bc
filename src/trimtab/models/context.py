"""A longer context by linear interpolation of rotary positions (arXiv 2306.15595): position t turns as t / factor."""

from __future__ import annotations

from typing import Any

from trimtab.core.errors import UserError


def lengthen(config: Any, tokens: int, source: str) -> str:
    """Make a configuration take `tokens` tokens, before its model is built; returns what was done, in words.

    The factor is the next whole number, so that new positions fall between the old ones. One that is there already is
    multiplied. A model that takes as many tokens as it is stays as it is.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    own = getattr(text, "max_position_embeddings", None)
    rotary = getattr(text, "rope_parameters", None)
    fix = "leave `context` out, or take a model with plain rotary positions, such as smollm2-135m-instruct"
    if not own or not rotary:
        raise UserError(f"context: {source} has no rotary positions, so there is nothing to interpolate", fix=fix)
    if tokens <= own:
        return f"context: the model takes {own} tokens already"
    kind = rotary.get("rope_type", "")
    if kind not in ("default", "linear"):
        found = f"of type {kind}" if kind else "of several types"
        raise UserError(f"context: the rotary positions of {source} are {found}, not plain or linear ones", fix=fix)
    factor = -(-tokens // own)
    text.rope_parameters = rotary | {"rope_type": "linear", "factor": float(rotary.get("factor", 1.0) * factor)}
    text.max_position_embeddings = tokens
    return f"context: {own} -> {tokens} tokens, rotary positions divided by {factor}"
