"""What an adapter did to the weights, against NumPy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.test_packing import llama

import trimtab as tt
from trimtab.core.errors import UserError
from trimtab.interop.analysis import analyse, described, length_and_direction, strongest


def tuned(method: Any, where: str | None = None) -> Any:
    torch.manual_seed(0)
    model = tt.attach(llama(), method, where)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return model


def by_hand(W: np.ndarray, tuned: np.ndarray) -> dict[str, Any]:
    """The definitions, written out over rows."""
    D = tuned - W
    lengths = [abs(np.sqrt((b**2).sum()) - np.sqrt((a**2).sum())) for a, b in zip(W, tuned, strict=True)]
    turns = [1 - a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in zip(W, tuned, strict=True)]
    U, S, Vt = np.linalg.svd(D)
    q = S[S > 0] / S.sum()
    r = int(np.ceil((S**2).sum() / S[0] ** 2 - 1e-9))
    inside = np.linalg.norm(U[:, :r].T @ W @ Vt[:r].T)
    top = np.linalg.svd(W)[0][:, :r]
    return {
        "magnitude": np.mean(lengths),
        "direction": np.mean(turns),
        "relative": np.linalg.norm(D) / np.linalg.norm(W),
        "effective_rank": np.exp(-(q * np.log(q)).sum()),
        "stable_rank": (S**2).sum() / S[0] ** 2,
        "amplification": np.linalg.norm(D) / inside,
        "overlap": (np.linalg.norm(U[:, :r].T @ top) ** 2) / r,
        "energy": (S[:2] ** 2).sum() / (S**2).sum(),
    }


@pytest.mark.parametrize("method", [tt.LoRA(rank=3), tt.Full(), tt.Magnitude(tt.LoRA(rank=2)), tt.IA3()])
def test_every_figure_is_that_of_numpy(method: Any) -> None:
    model = tuned(method, "q, down" if not isinstance(method, tt.IA3) else None)
    torch.manual_seed(0)
    plain = {name: parameter.detach().double().numpy() for name, parameter in llama().named_parameters()}
    found = analyse(model)
    merged = {name: parameter.detach().double().numpy() for name, parameter in tt.merge(model).named_parameters()}
    assert found.changes
    for one in found.changes:
        expected = by_hand(plain[f"{one.site}.weight"], merged[f"{one.site}.weight"])
        for key in ("magnitude", "direction", "relative", "effective_rank", "stable_rank", "amplification", "overlap"):
            assert getattr(one, key) == pytest.approx(expected[key], rel=2e-3, abs=1e-6), (one.site, key)
        assert one.energy_at[2] == pytest.approx(expected["energy"], rel=2e-3)
        if isinstance(method, tt.LoRA):
            assert one.rank == 3
            assert one.energy_at[4] == pytest.approx(1)


def test_length_and_direction_are_told_apart() -> None:
    W = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    longer, turned = W * torch.tensor([[2.0], [3.0], [1.0]]), torch.tensor([[4.0, -3.0], [0.0, 1.0], [0.0, 0.0]])
    assert length_and_direction(W, longer) == pytest.approx(((5 + 2) / 3, 0.0))
    assert length_and_direction(W, turned.double()) == pytest.approx((0.0, 2 / 3))


def test_correlation_is_over_sites_and_roles() -> None:
    found = analyse(tuned(tt.LoRA(rank=2), "all-linear"), overlap=False)
    M, D = ([getattr(one, key) for one in found.changes] for key in ("magnitude", "direction"))
    assert found.correlation == pytest.approx(np.corrcoef(M, D)[0, 1], rel=1e-9)
    assert set(found.by_role) == {"q", "k", "v", "o", "gate", "up", "down"}
    assert all(one.overlap is None for one in found.changes)
    assert "r = " in described(found)


def test_what_did_not_change_and_what_has_no_weights() -> None:
    torch.manual_seed(0)
    untouched = analyse(tt.attach(llama(), tt.LoRA(rank=2), "q"))
    assert all(one.rank == 0 and one.relative == 0 and one.overlap is None for one in untouched.changes)
    assert untouched.correlation is None
    assert "too few" in described(untouched)
    with pytest.raises(UserError, match="no change of weights"):
        analyse(tuned(tt.Houlsby(bottleneck=2)))


def test_randomized_directions_are_the_exact_ones_of_a_falling_spectrum(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(40, 30, dtype=torch.float64))
    W = Q * 0.5 ** torch.arange(30)
    exact = strongest(W, 3)
    monkeypatch.setattr("trimtab.interop.analysis.EXACT", 8)
    assert (exact.mT @ strongest(W, 3)).abs().diag().min() > 1 - 1e-9
