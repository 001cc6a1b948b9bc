"""Small gradients move into one piece of memory, with every number as it was."""

from __future__ import annotations

import pytest
import torch
from tests.engine.test_packing import llama, rows_with_common_beginnings
from torch import Tensor, nn

import trimtab as tt
from trimtab.data.packing import pack
from trimtab.engine import gradients
from trimtab.engine.faster import running
from trimtab.engine.gradients import side_by_side
from trimtab.engine.loss import loss_sum


class Two(nn.Module):
    """A large frozen matrix, and two small trained ones of which one may be left out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.W = nn.Parameter(torch.randn(64, 64), requires_grad=False)
        self.A, self.B = nn.Parameter(torch.randn(2, 64)), nn.Parameter(torch.randn(5, 2))

    def forward(self, x: Tensor, both: bool = True) -> Tensor:
        h = x @ self.W @ self.A.mT
        return ((h @ self.B.mT) if both else h).square().sum()


def memory_of(tensor: Tensor | None) -> int:
    assert tensor is not None
    return tensor.untyped_storage().data_ptr()


def test_the_numbers_are_those_without_and_the_memory_is_one() -> None:
    model, x = Two(), torch.randn(3, 64)
    model(x).backward()
    plain = [model.A.grad, model.B.grad]
    assert memory_of(plain[0]) != memory_of(plain[1])
    model.zero_grad(set_to_none=True)
    with side_by_side(model):
        model(x).backward()
    for parameter, expected in zip((model.A, model.B), plain, strict=True):
        assert parameter.grad is not None
        assert expected is not None
        assert torch.equal(parameter.grad, expected)
        assert parameter.grad.is_contiguous()
        assert parameter.grad.data_ptr() % 64 == 0
    assert memory_of(model.A.grad) == memory_of(model.B.grad)


def test_what_gets_no_gradient_has_none() -> None:
    model = Two()
    with side_by_side(model):
        model(torch.randn(3, 64), both=False).backward()
    assert model.A.grad is not None
    assert model.B.grad is None


def test_several_passes_add_up_where_the_first_one_lies() -> None:
    model, x = Two(), torch.randn(3, 64)
    with side_by_side(model):
        model(x).backward()
        once, place = model.A.grad.clone(), model.A.grad.data_ptr()  # type: ignore[union-attr]
        model(x).backward()
    assert model.A.grad is not None
    assert model.A.grad.data_ptr() == place
    assert torch.equal(model.A.grad, 2 * once)


def test_gradients_that_somebody_holds_stay_as_they_are() -> None:
    model, x = Two(), torch.randn(3, 64)
    with side_by_side(model):
        model(x).backward()
        held = model.A.grad
        assert held is not None
        before = held.clone()
        model.zero_grad(set_to_none=True)
        model(2 * x).backward()
    assert torch.equal(held, before)
    assert not torch.equal(model.A.grad, before)  # type: ignore[arg-type]


def test_the_gradient_of_a_parameter_that_has_grown_stays_where_it_is() -> None:
    model, x = Two(), torch.randn(3, 64)
    with side_by_side(model):
        model.B.data = torch.randn(9, 2)
        model(x).backward()
    assert memory_of(model.A.grad) != memory_of(model.B.grad)
    assert model.B.grad is not None
    assert model.B.grad.shape == (9, 2)


def test_nothing_moves_where_much_trains_or_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 64)
    for much, small in ((1000, 1 << 20), (8, 100)):
        monkeypatch.setattr(gradients, "LITTLE", much)
        monkeypatch.setattr(gradients, "SMALL", small)
        model = Two()
        with side_by_side(model):
            model(x).backward()
        assert memory_of(model.A.grad) != memory_of(model.B.grad)


@pytest.mark.parametrize("policy", ["off", "block", "sqrt", "selective", "offload"])
def test_blocks_that_run_again_have_theirs_side_by_side(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "LITTLE", 0)
    torch.manual_seed(0)
    model = tt.attach(llama(), tt.LoRA(rank=2)).train()
    batch = pack(rows_with_common_beginnings())
    with running(model, packed=True, policy=policy):
        loss_sum(model, batch, "causal")[0].backward()
    places = {memory_of(p.grad) for p in model.parameters() if p.requires_grad}
    assert (len(places) == 1) is (policy != "off")
