"""Columns in another order: what is decoded, what it costs, what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from trimtab.core.errors import UserError
from trimtab.core.registry import from_json, to_json
from trimtab.storage.affine import Affine
from trimtab.storage.gptq import GPTQ
from trimtab.storage.nf4 import NF4
from trimtab.storage.permuted import Permuted

FORMATS = [Permuted(), Permuted(Affine(3, 16)), Permuted(NF4(double=True))]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_column_j_of_the_codes_is_column_order_j(format: Permuted) -> None:
    draw = np.random.default_rng(0)
    W = torch.from_numpy(draw.normal(size=(5, 64)).astype(np.float32))
    order = torch.from_numpy(draw.permutation(64).astype(np.int32))
    code = {**format.inner.encode(W[:, order.long()]), "order": order}
    inner = format.inner.decode(format.inner.encode(W[:, order.long()]), (5, 64)).numpy()
    wanted = np.empty_like(inner)
    for j, column in enumerate(order.tolist()):
        wanted[:, column] = inner[:, j]
    np.testing.assert_array_equal(format.decode(code, (5, 64)).numpy(), wanted)
    assert not np.array_equal(wanted, inner)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_encoding_keeps_the_columns_and_its_size_is_the_formula(format: Permuted) -> None:
    W = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    code = format.encode(W)
    assert torch.equal(format.decode(code, (48, 64)), format.inner.decode(format.inner.encode(W), (48, 64)))
    assert sum(value.nbytes for value in code.values()) == pytest.approx(format.bits((48, 64)) * 48 * 64 / 8)
    assert from_json(json.loads(json.dumps(to_json(format)))) == format
    blank = format.encode(torch.empty(48, 64, device="meta"))
    assert {name: value.shape for name, value in blank.items()} == {name: value.shape for name, value in code.items()}


def test_what_it_cannot_hold() -> None:
    with pytest.raises(UserError, match="Permuted: 1 of 64 entries"):
        Permuted().encode(torch.full((1, 64), 1.0).index_fill(1, torch.tensor([3]), float("nan")))
    for inner in (Permuted(), GPTQ(), "affine"):
        with pytest.raises(UserError, match="cannot store the columns"):
            Permuted(inner)  # type: ignore[arg-type]
