"""Nonlinearities by name, for methods that let one be chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor

from trimtab.core.errors import UserError

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


def activated(name: str, x: Tensor) -> Tensor:
    """The nonlinearity of this name at x."""
    return ACTIVATIONS[name](x)


def check_activation(method: object, name: str) -> None:
    """Refuse a name that is none."""
    if name not in ACTIVATIONS:
        raise UserError(
            f"{type(method).__name__}: activation={name!r} is not known", fix=f"one of {', '.join(ACTIVATIONS)}"
        )
