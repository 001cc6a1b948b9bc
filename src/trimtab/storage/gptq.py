"""GPTQ: affine codes chosen column by column, so that what a layer computes on real inputs changes least."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.bits import pack
from trimtab.core.errors import UserError
from trimtab.core.format import Format
from trimtab.storage._blocks import checked
from trimtab.storage.affine import Affine, grid_of


@dataclass(frozen=True)
class GPTQ(Format):
    """argmin over codes of ‖X Wᵀ − X Ŵᵀ‖², greedily: round column i, then let the later columns make up for its error.

    H = 2 X Xᵀ (in, in) of the layer's inputs, H += `damping` · mean(diag H) I, U the upper Cholesky factor of H⁻¹. For
    each column: e = (w_i − ŵ_i) / U_ii, then w_j −= e U_ij for all j > i; inside `block_size` columns at once, beyond
    them when the block is done. An input that was never seen keeps no weight. A group's scale and zero come from its
    weights as corrected so far; with `act_order` columns are taken from the largest H_ii down, and groups, which stay
    where they are, take theirs from the original weights.

    Tensors, decoding and bits per weight: those of `Affine`, whose zero points are not rounded. Needs inputs:
    `trimtab.calibrate` measures them; `encode` alone, as when merged weights are coded again, rounds to the nearest.
    Encoding costs in³ in float64 once per H, and out · in² / 2 multiplications. Errors: those of `Affine`; an H that is
    not finite, or not positive definite even when damped.
    Reference: Frantar et al., arXiv 2210.17323; damping, block and order as in their code. H is factored in float64.
    """

    code_bits: int = 4
    group_size: int | None = 64
    act_order: bool = False
    damping: float = 0.01
    block_size: int = 128

    def __post_init__(self) -> None:
        Affine(self.code_bits, self.group_size)
        if not 0 < self.damping < 1 or self.block_size < 1:
            raise UserError(
                f"GPTQ: damping={self.damping}, block_size={self.block_size}",
                fix="damping above 0 and below 1, as 0.01; block_size of 1 or more",
            )

    @property
    def needs_inputs(self) -> bool:
        return True

    @property
    def affine(self) -> Affine:
        """The format that decodes it."""
        return Affine(self.code_bits, self.group_size)

    def encode(self, W: Tensor) -> dict[str, Tensor]:
        return self.affine.encode(W)

    def encode_for(self, W: Tensor, H: Tensor) -> dict[str, Tensor]:
        size, top = self.affine.size_in(tuple(W.shape)), 2**self.code_bits - 1
        W = checked(W, "GPTQ").clone()
        U, order, unseen = self.factor(H.to(W.device))
        W[:, unseen] = 0.0
        _, scale, zero = grid_of(W.view(W.shape[0], -1, size), top)  # (out, groups)
        codes = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
        W = W[:, order].contiguous() if self.act_order else W
        for start, stop in spans(W.shape[1], self.block_size, None if self.act_order else size):
            errors = torch.empty(W.shape[0], stop - start, device=W.device)
            block = W[:, start:stop]
            for i in range(start, stop):
                column = int(order[i])
                group = column // size
                if not self.act_order and i % size == 0:
                    _, scale[:, group], zero[:, group] = grid_of(W[:, i : i + size], top)
                w, s, z = W[:, i], scale[:, group], zero[:, group]
                q = (w / s + z).round_().clamp_(0, top)
                codes[:, column] = q.to(torch.uint8)
                e = (w - (q - z) * s) / U[i, i]
                block[:, i - start :].addr_(e, U[i, i:stop], alpha=-1.0)
                errors[:, i - start] = e
            W[:, stop:].addmm_(errors, U[start:stop, stop:], alpha=-1.0)
        return {"codes": pack(codes.view(-1), self.code_bits), "scale": scale, "zero": zero}

    def factor(self, H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(U with Uᵀ U = H⁻¹ in fp32, the order of columns, which inputs were never seen)."""
        device = H.device
        H = H.detach().to("cpu" if device.type == "mps" else device, torch.float64).clone()
        if not bool(torch.isfinite(H).all()):
            raise UserError("GPTQ: the inputs of a layer are not finite", fix="look at the model and the rows")
        diagonal = H.diagonal()
        unseen = diagonal == 0
        diagonal[unseen] = 1.0
        order = torch.arange(len(H), device=H.device)
        if self.act_order:
            order = diagonal.argsort(descending=True, stable=True)
            H = H[order][:, order]
        H.diagonal().add_(self.damping * float(H.diagonal().mean()))
        try:
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
            U = torch.linalg.cholesky(inverse, upper=True)
        except RuntimeError:
            raise UserError(
                "GPTQ: the second moment of a layer's inputs has no inverse", fix="more rows, or a larger damping"
            ) from None
        return U.float().to(device), order.to(device), unseen.to(device)

    def decode(self, code: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        return self.affine.decode(code, shape)

    def bits(self, shape: tuple[int, ...]) -> float:
        return self.affine.bits(shape)


def spans(columns: int, block: int, group: int | None) -> Iterator[tuple[int, int]]:
    """Blocks of at most `block` columns, none of which holds a part of a group beside the start of another."""
    if group is None or group >= columns:
        whole, inside = columns, block
    elif group <= block:
        whole, inside = columns, block // group * group
    else:
        whole, inside = group, block
    for first in range(0, columns, whole):
        for start in range(first, first + whole, inside):
            yield start, min(start + inside, first + whole)
