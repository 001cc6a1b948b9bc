"""The keys of GPTQ checkpoints: integer codes in 32-bit words along the inputs, scales and zero points by group."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trimtab.core.bits import pack
from trimtab.core.errors import UserError
from trimtab.core.format import Format
from trimtab.models.coded.source import Coded, Get, Layout
from trimtab.storage.affine import Affine
from trimtab.storage.permuted import Permuted

AGAIN = "copy the file again from where the model came from"
BITS = (2, 3, 4, 8)


class GPTQWords(Layout):
    """`qweight` int32 (in bits / 32, out), `qzeros` int32 (groups, out bits / 32), `scales` (groups, out), `g_idx` (in)

    Codes are a stream of bits, first code in the lowest bits of the first word, so 3-bit codes go across words. Of a
    `gptq` file the zero points are stored one too low, modulo 2^bits; of a `gptq_v2` file as they are.
    Groups whose columns are neighbours are groups of `Affine`; others (desc_act) are brought together by `Permuted`.
    Groups of unequal sizes become smaller ones, of their greatest common divisor, with repeated scales.
    """

    name = "GPTQ"
    marks = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, bits: int, group_size: int, shift: int, mixed: bool = False) -> None:
        self.bits, self.group_size, self.shift, self.mixed = bits, group_size, shift, mixed

    def format(self, get: Get) -> tuple[Format, tuple[int, int]]:
        qweight, index = tensor(get, "qweight", torch.int32), self.index_of(get)
        bits = self.bits_of(qweight, len(index))
        inner = Affine(bits, size_of(index))
        contiguous = bool((index[1:] >= index[:-1]).all())
        return (inner if contiguous else Permuted(inner)), (qweight.shape[1], len(index))

    def read(self, get: Get) -> Coded:
        format, (out, into) = self.format(get)
        inner = format.inner if isinstance(format, Permuted) else format
        assert isinstance(inner, Affine)
        bits, index = inner.code_bits, self.index_of(get)
        scales, qzeros = get("scales"), tensor(get, "qzeros", torch.int32)
        if scales is None or scales.ndim != 2 or scales.shape[1] != out or not scales.is_floating_point():
            raise UserError(f"`scales` is missing or not (groups, {out})", fix=AGAIN)
        groups = scales.shape[0]
        if qzeros.shape != (groups, words(out, bits)) or int(index.max()) >= groups:
            raise UserError(
                f"`qzeros` {tuple(qzeros.shape)}, `g_idx` and `scales` are not of {groups} groups", fix=AGAIN
            )
        if not bool(torch.isfinite(scales).all()):
            raise UserError("`scales` has values that are infinite or NaN", fix=AGAIN)
        order = index.argsort(stable=True)  # columns, group by group
        codes = numbers(tensor(get, "qweight", torch.int32), bits, into).mT  # (out, in)
        zeros = numbers(qzeros.mT, bits, out).mT  # (groups, out)
        zeros = (zeros.int() + self.shift) % 2**bits
        chosen = index[order][:: inner.size_in((out, into))]
        tensors = {
            "codes": pack(codes[:, order].contiguous().view(-1), bits),
            "scale": scales.float()[chosen].mT.contiguous(),
            "zero": zeros.float()[chosen].mT.contiguous(),
        }
        if isinstance(format, Permuted):
            tensors["order"] = order.int()
        return Coded(format, tensors, (out, into))

    def index_of(self, get: Get) -> Tensor:
        """The group of every column."""
        index = get("g_idx")
        if index is not None and index.numel():
            if index.ndim != 1 or index.is_floating_point() or int(index.min()) < 0:
                raise UserError("`g_idx` is not the group of every input", fix=AGAIN)
            return index.long()
        qweight = tensor(get, "qweight", torch.int32)
        if qweight.shape[0] * 32 % self.bits:
            raise UserError("`g_idx` is missing", fix=AGAIN)
        into = qweight.shape[0] * 32 // self.bits
        return torch.arange(into) // (into if self.group_size < 1 else self.group_size)

    def bits_of(self, qweight: Tensor, into: int) -> int:
        """Bits per code: those of config.json, or, where it names exceptions, what the number of words says."""
        able = [bits for bits in BITS if words(into, bits) == qweight.shape[0]]
        if self.bits in able:
            return self.bits
        if self.mixed and len(able) == 1:
            return able[0]
        raise UserError(
            f"`qweight` has {qweight.shape[0]} words for {into} inputs, which {self.bits}-bit codes do not make",
            fix=AGAIN,
        )


def tensor(get: Get, end: str, dtype: torch.dtype) -> Tensor:
    """A matrix of a type, or an error."""
    found = get(end)
    if found is None:
        raise UserError(f"`{end}` is missing", fix=AGAIN)
    if found.dtype != dtype or found.ndim != 2:
        kind = str(found.dtype).removeprefix("torch.")
        raise UserError(f"`{end}` is {kind} {tuple(found.shape)}, a matrix of 32-bit words expected", fix=AGAIN)
    return found


def words(count: int, bits: int) -> int:
    """32-bit words that `count` codes fill."""
    return -(-count * bits // 32)


def size_of(index: Tensor) -> int:
    """Columns that have a scale in common, once they are in the order of their groups: the gcd of all groups' sizes."""
    return math.gcd(*index.bincount()[index.unique()].tolist())


def numbers(stream: Tensor, bits: int, count: int) -> Tensor:
    """The codes (count, columns) uint8 in words (words, columns): code j in bits j·bits and above, lowest first."""
    made = torch.empty(count, stream.shape[1], dtype=torch.uint8)
    mask, wide = 2**bits - 1, stream.long() & 0xFFFFFFFF
    place = torch.arange(count) * bits
    for start in range(0, count, 1024):
        at = place[start : start + 1024]
        word, low = at // 32, (at % 32)[:, None]
        after = (word + 1).clamp(max=len(wide) - 1)
        both = wide[word] | wide[after] << 32
        made[start : start + 1024] = ((both >> low) & mask).to(torch.uint8)
    return made
