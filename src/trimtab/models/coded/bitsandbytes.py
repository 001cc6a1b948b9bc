"""The keys of bitsandbytes: four bits (NF4, FP4) with or without quantized scales, and int8 with a scale per row."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.format import Format
from trimtab.models.coded.source import Coded, Get, Layout
from trimtab.storage import fp4, nf4
from trimtab.storage.absmax import Absmax
from trimtab.storage.dynamic8 import MAPS, Dynamic8

AGAIN = "copy the file again from where the model came from"
STATE = "weight.quant_state.bitsandbytes__"


class FourBits(Layout):
    """`weight` uint8, two codes a byte, the first one in the high half; `weight.absmax` of every block, fp32, or uint8
    with `weight.nested_absmax`; a JSON text in `weight.quant_state.bitsandbytes__nf4` (or `__fp4`)."""

    name = "bitsandbytes 4-bit"
    marks = (
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        f"{STATE}nf4",
        f"{STATE}fp4",
    )

    def format(self, get: Get) -> tuple[Format, tuple[int, int]]:
        state = state_of(get)
        nested = state.get("nested_blocksize")
        scale = None if nested is None else Dynamic8(block_size=int(nested), center=True, grid=65536)
        kind = nf4.NF4 if state["quant_type"] == "nf4" else fp4.FP4
        out, into = state["shape"]
        return kind(int(state["blocksize"]), scale), (int(out), int(into))

    def read(self, get: Get) -> Coded:
        format, shape = self.format(get)
        state, count = state_of(get), math.prod(shape)
        codes = raw(get, "weight", torch.uint8, (count + 1) // 2).view(-1, 1)
        levels = nf4.LEVELS if state["quant_type"] == "nf4" else fp4.LEVELS
        same_levels(get("weight.quant_map"), levels, "weight.quant_map")
        blocks = -(-count // state["blocksize"])
        if "nested_blocksize" not in state:
            return Coded(format, {"codes": codes, "absmax": raw(get, "weight.absmax", torch.float32, blocks)}, shape)
        same_levels(get("weight.nested_quant_map"), MAPS[True], "weight.nested_quant_map")
        outer = -(-blocks // state["nested_blocksize"])
        offset = float(state["nested_offset"])
        tensors = {
            "codes": codes,
            "absmax_offset": torch.tensor([offset], dtype=torch.float32),
            "absmax_codes": raw(get, "weight.absmax", torch.uint8, blocks),
            "absmax_absmax": raw(get, "weight.nested_absmax", torch.float32, outer),
        }
        blank = format.encode(torch.empty(shape, device="meta"))
        return Coded(format, {name: tensors[name] for name in blank}, shape)


class EightBits(Layout):
    """`weight` int8 (out, in) and `SCB` fp32 (out): W = SCB weight / 127. `weight_format` 0 is row by row."""

    name = "bitsandbytes int8"
    marks = ("SCB", "weight_format")

    def format(self, get: Get) -> tuple[Format, tuple[int, int]]:
        weight = get("weight")
        if weight is None or weight.ndim != 2:
            raise UserError("`weight` is missing or no matrix", fix=AGAIN)
        return Absmax(), (weight.shape[0], weight.shape[1])

    def read(self, get: Get) -> Coded:
        format, shape = self.format(get)
        layout = get("weight_format")
        if layout is not None and int(layout.reshape(-1)[0]) != 0:
            raise UserError(
                f"`weight_format` is {int(layout.reshape(-1)[0])}, an order for one kind of GPU",
                fix="load and save the model once with bitsandbytes 0.45 or later, which writes rows",
            )
        codes = raw(get, "weight", torch.int8, math.prod(shape)).view(shape)
        return Coded(format, {"codes": codes, "absmax": raw(get, "SCB", torch.float32, shape[0])}, shape)


def state_of(get: Get) -> dict[str, Any]:
    """The record of a 4-bit weight, checked."""
    found = [(kind, text) for kind in ("nf4", "fp4") if (text := get(f"{STATE}{kind}")) is not None]
    if len(found) != 1:
        raise UserError(f"`{STATE}nf4` (or `__fp4`) is missing", fix="save the model with bitsandbytes 0.41.3 or later")
    kind, text = found[0]
    try:
        state: dict[str, Any] = json.loads(bytes(text.reshape(-1).view(torch.uint8).tolist()))
        nested = [state[f"nested_{name}"] for name in ("blocksize", "offset", "dtype") if "nested_blocksize" in state]
        sizes = [state["blocksize"], *nested[:1], *state["shape"]]
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"sizes {sizes}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"`{STATE}{kind}` is no record of a 4-bit weight: {error!r}", fix=AGAIN) from None
    if state.get("quant_type") != kind:
        raise UserError(f"`{STATE}{kind}` says quant_type {state.get('quant_type')!r}", fix=AGAIN)
    if len(state["shape"]) != 2:
        raise UserError(
            f"a 4-bit weight of shape {state['shape']}: only matrices are taken", fix="the unquantized model"
        )
    if nested and (state["nested_dtype"] != "float32" or not math.isfinite(float(state["nested_offset"]))):
        raise UserError(
            f"scales of scales in {state['nested_dtype']} with offset {state['nested_offset']}: ours are float32",
            fix="the unquantized model, with quantize: nf4-double",
        )
    return state


def raw(get: Get, end: str, dtype: torch.dtype, count: int) -> Tensor:
    """A tensor as `count` flat values of a type; 4-bit codes may lie in any wider type (`quant_storage`)."""
    found = get(end)
    if found is None:
        raise UserError(f"`{end}` is missing", fix=AGAIN)
    flat = found.contiguous().reshape(-1)
    if dtype == torch.uint8 and end == "weight":
        flat = flat.view(torch.uint8)
    if flat.dtype != dtype or flat.numel() != count:
        names = [str(one).removeprefix("torch.") for one in (flat.dtype, dtype)]
        raise UserError(f"`{end}` has {flat.numel()} values of {names[0]}, {count} of {names[1]} expected", fix=AGAIN)
    if dtype.is_floating_point and not bool(torch.isfinite(flat).all()):
        raise UserError(f"`{end}` has values that are infinite or NaN", fix=AGAIN)
    return flat.clone()


def same_levels(found: Tensor | None, ours: Tensor, end: str) -> None:
    """Refuse a table of levels that is not ours: its codes would stand for other values."""
    if found is None:
        raise UserError(f"`{end}` is missing", fix=AGAIN)
    if found.numel() != ours.numel() or not torch.allclose(found.reshape(-1).float(), ours, rtol=0, atol=1e-7):
        raise UserError(
            f"`{end}` is a table of levels of its own, and the codes here stand for bitsandbytes' usual ones",
            fix="the unquantized model, with quantize: nf4",
        )
