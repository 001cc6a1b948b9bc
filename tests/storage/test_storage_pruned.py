"""Formats of pruned weights: the right entries are left, a given pattern is kept, and the sizes are what they say."""

from __future__ import annotations

import oracle_pruned
import pytest
import torch

import trimtab as tt
from trimtab.storage.n_of_m import NOfM
from trimtab.storage.pruned import Pruned


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.97])
@pytest.mark.parametrize("shape", [(6, 20), (7, 13), (1, 5)])
def test_the_smallest_of_the_matrix_go(sparsity: float, shape: tuple[int, int]) -> None:
    W, size = normal(*shape), shape[0] * shape[1]
    code = Pruned(sparsity, "float32").encode(W)
    expected = oracle_pruned.without_smallest(W.double().numpy(), int(sparsity * size), size)
    found = Pruned(sparsity, "float32").decode(code, shape)
    assert (found.double().numpy() == expected).all()
    assert bytes(code["kept"].tolist()) == oracle_pruned.bitmap(expected != 0)


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (4, 4), (3, 5)])
def test_the_smallest_of_each_group_go(keep: int, of: int) -> None:
    W = normal(6, 20)
    method = NOfM(keep, of, "float32")
    code = method.encode(W)
    expected = oracle_pruned.without_smallest(W.double().numpy(), of - keep, of)
    assert (method.decode(code, (6, 20)).double().numpy() == expected).all()
    assert bytes(code["kept"].tolist()) == oracle_pruned.bitmap(expected != 0)
    assert sum(tensor.nbytes for tensor in code.values()) == method.bytes((6, 20))
    again = method.encode(method.decode(code, (6, 20)))
    assert all(torch.equal(code[key], again[key]) for key in code)


@pytest.mark.parametrize("method", [Pruned(0.5), NOfM()], ids=str)
def test_a_pattern_that_is_there_is_kept_bit_for_bit(method: tt.Format) -> None:
    """Whatever chose the zeros: here Wanda, which by no means keeps the largest weights."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 24)).to(torch.bfloat16)
    mixed = normal(32, 32)
    C = (mixed @ mixed.mT) * torch.linspace(0.01, 30, 32)[:, None]
    tt.prune(model, 0.5, "0", covariance={"0": C}, of=4)
    W = model[0].weight.detach().clone()
    assert int((W == 0).sum()) == W.numel() // 2
    assert not torch.equal(Pruned(0.5).decode(Pruned(0.5).encode(normal(24, 32)), (24, 32)) == 0, W == 0)
    tt.quantize(model, method, where="0")
    assert torch.equal(model[0].code.dense(), W)
    assert model[0].code.nbytes * 8 / W.numel() == pytest.approx(9.0)


def test_bits_of_a_large_matrix() -> None:
    assert Pruned(0.5).bits((4096, 4096)) == pytest.approx(9.0)
    assert Pruned(0.75, "float32").bits((4096, 4096)) == pytest.approx(9.0)
    assert NOfM().bits((4096, 4096)) == pytest.approx(9.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pruned(1.0), "sparsity=1.0"),
        (lambda: Pruned(dtype="int8"), "int8"),
        (lambda: NOfM(5, 4), "keep=5"),
        (lambda: NOfM().encode(torch.ones(3, 6)), "of=4 does not divide in_features=6"),
        (lambda: Pruned(0.5, "float16").encode(torch.full((2, 2), 1e9)), "overflow float16"),
        (lambda: NOfM(2, 4, "float16").encode(torch.full((2, 4), 1e9)), "overflow float16"),
    ],
)
def test_wrong_settings_are_explained(make, message: str) -> None:
    with pytest.raises(tt.UserError, match=message):
        make()
