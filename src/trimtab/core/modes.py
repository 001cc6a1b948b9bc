"""Training and evaluation mode, module by module: what was in evaluation mode on purpose stays so afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode (no dropout) inside; then every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def dropout_rates(module: Any) -> Iterator[tuple[str, float]]:
    """Rates of dropout above 0 by attribute, of a module or a configuration: a layer's, or what an attention reads."""
    for name, value in vars(module).items():
        named = "drop" in name or (name == "p" and isinstance(module, nn.Dropout))
        if named and isinstance(value, float) and value > 0:
            yield name, value
