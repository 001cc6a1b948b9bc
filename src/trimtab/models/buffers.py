"""Tensors that a model computes from its configuration (rotary positions), made for one built without memory."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


def fill_buffers(model: nn.Module) -> bool:
    """Give modules without weights (rotary positions) the tensors that their configuration makes; whether all have."""
    for _, module in hollow_buffers(model):
        try:
            made = type(module)(module.config)
        except (TypeError, AttributeError):
            return False
        module._buffers.update(made._buffers)
        for key, value in vars(made).items():
            if isinstance(value, Tensor):
                module.__dict__[key] = value
    return not any(True for _ in hollow_buffers(model))


def hollow_buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with buffers on the meta device."""
    for name, module in model.named_modules():
        if any(buffer is not None and buffer.is_meta for buffer in module._buffers.values()):
            yield name, module
