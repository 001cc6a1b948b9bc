"""Labelled rows end to end through an encoder: no padding, and past the last attention only what is read.

An encoder that reads its label off each row's first token needs nothing else of the last block once attention has
mixed the row: those tokens alone go on from there, as rows of one position. Where that seam is, and where positions
count from, is found by trying: the packed outputs of a few rows must be their padded ones, in float32, where rounding
does not hide that they are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.modes import evaluating
from trimtab.core.select import select
from trimtab.data.batches import collate
from trimtab.data.encoded import Encoded
from trimtab.data.packing import bag
from trimtab.engine.attention import plain_attention, reads_positions, segments_in
from trimtab.engine.precision import computing_in, room_for

EXACT = 1e-4
"""Largest difference of packed and padded outputs, relative to the largest output."""


@dataclass(frozen=True)
class Seam:
    """Where a packed encoder narrows to its rows' first tokens, and what their first position is."""

    path: str
    first_position: int


def seam_of(model: Any, rows: Sequence[Encoded], pad_id: int) -> Seam | None:
    """The seam of an encoder, tried on some rows; None where none is exact, so rows have to be padded."""
    longest = max(len(row.ids) for row in rows)
    if reads_positions(model) or not plain_attention(model, 2 * longest):  # a window reaches half to either side
        return None
    by_length = sorted(rows, key=lambda row: len(row.ids))
    few = [by_length[at * (len(rows) - 1) // 2] for at in range(3)]
    if len({len(row.ids) for row in few}) == 1:
        return None
    starts = dict.fromkeys([0, (getattr(model.config, "pad_token_id", None) or 0) + 1])
    tried = [Seam(path, first) for path in candidates(model) for first in starts]
    return next((seam for seam in tried if exact(model, seam, few, pad_id)), None)


def candidates(model: nn.Module) -> list[str]:
    """Modules whose output may be all that the rest of the model reads: the last block's attention, the last block."""
    try:
        block = select(model, "block")[-1].module
        inside = [place.module for place in select(model, "o") if place.module.startswith(f"{block}.")]
    except UserError:
        return []
    below = {".".join(path.split(".")[: block.count(".") + 2]) for path in inside}
    return [*sorted(below - set(inside)), block]


@torch.no_grad()
def exact(model: Any, seam: Seam, rows: Sequence[Encoded], pad_id: int) -> bool:
    """Whether packed rows give the outputs of padded ones."""
    if not room_for(model):
        return False
    device = next(model.parameters()).device
    try:
        with evaluating(model):
            batch = {key: value.to(device) for key, value in collate(rows, pad_id).items() if key != "labels"}
            with computing_in(model):
                padded = model(**batch).logits
                with segments_in(model), first_tokens(model, seam):
                    packed = outputs(model, bag(rows, seam.first_position).to(device))
    except (UserError, TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False  # a method may refuse what packing puts in place of torch's attention
    if packed.shape != padded.shape:
        return False
    return bool((packed - padded).abs().max() <= EXACT * padded.abs().max())


def outputs(model: Any, rows: Any) -> Tensor:
    """(rows, classes) of a bag, inside `segments_in` and `first_tokens`."""
    types = {} if rows.types is None else {"token_type_ids": rows.types}
    logits: Tensor = model(input_ids=rows.ids, position_ids=rows.positions, segments=rows, **types).logits
    return logits


@contextmanager
def first_tokens(model: nn.Module, seam: Seam | None) -> Iterator[None]:
    """Past the seam, only each row's first token goes on: (1, tokens, width) becomes (rows, 1, width)."""
    if seam is None:
        yield
        return

    def narrow(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        rows = kwargs.get("segments")
        if rows is None:
            return output
        whole = output[0] if isinstance(output, tuple) else output
        first = whole[:, rows.first].transpose(0, 1)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    handle = model.get_submodule(seam.path).register_forward_hook(narrow, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
