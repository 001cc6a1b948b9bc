"""What laws look at in a model, and how they say that something does not hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from trimtab.core.delta import Delta
from trimtab.core.deltas import edited_modules
from trimtab.core.quantized import quantized_modules
from trimtab.core.raw import RawDeltas


class Broken(AssertionError):
    """A law does not hold; the message says by how much."""


class NotApplicable(Exception):
    """A law says nothing about this method on this host; the message says why."""


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that ask for a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def move(model: nn.Module, seed: int = 3, scale: float = 0.15) -> nn.Module:
    """Every trained tensor moved by noise, so that nothing is zero by design any more; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model).values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((scale * noise).to(parameter.dtype))
    return model


def deltas(model: nn.Module) -> Iterator[Delta]:
    """Every delta of a model."""
    for _, module in edited_modules(model):
        yield from module.delta.values()  # type: ignore[operator]


def reads_raw(model: nn.Module) -> bool:
    """Whether some site of a model is edited as a raw weight."""
    return any(isinstance(module.delta, RawDeltas) for _, module in edited_modules(model))


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything in the state dict that is not an adapter's."""
    return {
        name: value.detach().clone()
        for name, value in model.state_dict().items()
        if ".delta." not in f".{name}" and not name.startswith("trimtab_shared.")
    }


def same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor], what: str) -> None:
    """Equal names, types and bits, else `Broken`."""
    if list(one) != list(other):
        raise Broken(f"{what}: names differ: {sorted(set(one) ^ set(other)) or 'only in their order'}")
    changed = [name for name in one if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name])]
    if changed:
        raise Broken(f"{what}: {', '.join(changed[:4])} changed")


def close(found: Tensor, expected: Tensor, rtol: float, what: str) -> None:
    """Equal within rtol of the largest expected magnitude, else `Broken`."""
    if found.shape != expected.shape:
        raise Broken(f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    size = float(expected.detach().abs().max()) if expected.numel() else 0.0
    off = float((found.detach().double() - expected.detach().double()).abs().max()) if expected.numel() else 0.0
    if not off <= rtol * max(size, 1e-30):
        raise Broken(f"{what}: off by {off:.3g}, {off / max(size, 1e-30):.3g} of the largest value; allowed {rtol:.3g}")


def require(holds: bool, what: str) -> None:
    """`Broken` unless it holds."""
    if not holds:
        raise Broken(what)


def codes(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the encoded tensors of a model."""
    return {
        f"{path}.{name}": tensor.detach().clone()
        for path, module in quantized_modules(model)
        for name, tensor in module.code.tensors().items()  # type: ignore[union-attr,operator]
    }
