"""Blocks along an axis: how methods that cut a weight into pieces say that a size does not divide."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.site import Site


def require_blocks(name: str, site: Site, size: int, *wholes: int) -> None:
    """Refuse a block size that does not divide every one of these sizes of a site; names the nearest that do."""
    if all(whole % size == 0 for whole in wholes):
        return
    fitting = [one for one in range(1, min(wholes) + 1) if all(whole % one == 0 for whole in wholes)]
    close = sorted(sorted(fitting, key=lambda one: abs(one - size))[:3])
    sizes = " and ".join(map(str, dict.fromkeys(wholes)))
    raise UserError(
        f"{name}: blocks of {size} do not divide {sizes} of {site.name}", fix=f"{', '.join(map(str, close))} do"
    )


def cayley(Q: Tensor) -> Tensor:
    """(I + Q)(I − Q)⁻¹ of skew-symmetric blocks Q (..., size, size): rotations, the identity where Q is 0."""
    wide = Q.float() if Q.element_size() < 4 else Q
    identity = torch.eye(Q.shape[-1], dtype=wide.dtype, device=Q.device)
    return torch.linalg.solve(identity - wide, identity + wide).to(Q.dtype)


def rotate(x: Tensor, R: Tensor) -> Tensor:
    """x blockdiag(R) for x (..., blocks·size) and R (blocks, size, size)."""
    return torch.einsum("...nb,nbc->...nc", x.unflatten(-1, R.shape[:2]), R).flatten(-2)
