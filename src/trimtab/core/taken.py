"""Weights that are stored in a format without what the starts of a method take out of them (PiSSA, LoftQ)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.core.code import Code
from trimtab.core.delta import Delta
from trimtab.core.format import Format
from trimtab.core.places import Place
from trimtab.core.quantized import check_modules, dense_weight, put_code, quantize_module
from trimtab.core.registry import find
from trimtab.core.rows import Rows
from trimtab.core.state import Part


class Taken(NamedTuple):
    """A product up · down that is taken out of a weight, or of some of its rows, before it is encoded."""

    rows: Rows | None
    up: Tensor
    down: Tensor


def branch_of(taken: Sequence[Taken], out: int) -> tuple[Tensor, Tensor]:
    """All products taken out of one weight as a single one: up (out, ranks) and down (ranks, in)."""
    ups = [up.detach() if rows is None else rows.among(up.detach(), out, 0) for rows, up, _ in taken]
    return torch.cat(ups, 1), torch.cat([one.down.detach() for one in taken])


def with_branch(format: Format, rank: int) -> Format:
    """The format that keeps a high-precision product of a rank beside the codes of `format`."""
    made: Format = find("svdquant", "storage")(inner=format, rank=rank)
    return made


def quantize_without(module: nn.Module, format: Format, taken: Sequence[Taken]) -> nn.Module:
    """Store what is left of a linear weight after some products in `format`, the products beside it; returns it."""
    W = dense_weight(module)
    up, down = branch_of(taken, W.shape[0])
    with torch.no_grad():
        left = (W.double() - up.double() @ down.double()).to(torch.promote_types(W.dtype, torch.float32))
        tensors = {**format.encode(left), "up": up, "down": down}
    put_code(module, Code(with_branch(format, up.shape[1]), tensors, W.shape, W.dtype))
    return module


def same_branch(module: nn.Module, format: Format, taken: Sequence[Taken]) -> bool:
    """Whether a layer is stored as `quantize_without` would store it, as far as its code tells."""
    code: Any = module._modules["code"]
    up, down = branch_of(taken, code.shape[0])
    held = code.tensors()
    alike = code.format == with_branch(format, up.shape[1])
    return alike and torch.equal(held["up"], up.to(held["up"])) and torch.equal(held["down"], down.to(held["down"]))


def encode_plain(model: nn.Module, parts: Sequence[Part], format: Format) -> None:
    """Check that the linear weights of all sites can be stored in a format; do it where no start takes anything out."""
    linear = {part.label: encodable(model, part) for part in parts}
    check_modules(model, [place.module for part in parts for place in linear[part.label]], format)
    for part in parts:
        if part.method.takes_out:
            part.format = format
            continue
        for path in dict.fromkeys(place.module for place in linear[part.label]):
            quantize_module(model.get_submodule(path), format)


def encodable(model: nn.Module, part: Part) -> list[Place]:
    """The places of a part that are linear layers: what a format can hold."""
    return [place for place in part.places if place.kind == "linear" and place.parameter is None]


def products(model: nn.Module, work: Sequence[tuple[Part, Sequence[Delta]]]) -> dict[str, tuple[Format, list[Taken]]]:
    """Module path -> the format it is encoded in, and what is taken out of it first."""
    found: dict[str, tuple[Format, list[Taken]]] = {}
    for part, deltas in work:
        linear = encodable(model, part)
        for place, delta in zip(part.places, deltas, strict=True):
            pair = part.method.taken(delta)
            if place in linear and pair is not None and part.format is not None:
                found.setdefault(place.module, (part.format, []))[1].append(Taken(place.rows, *pair))
    return found


def encode_rest(model: nn.Module, work: Sequence[tuple[Part, Sequence[Delta]]]) -> None:
    """Encode the dense linear weights under deltas without the products that these take out of them."""
    for path, (format, taken) in products(model, work).items():
        module = model.get_submodule(path)
        if "code" not in module._modules:
            quantize_without(module, format, taken)
