"""A batch of rows with different adapters through grouped products: the same as one row at a time, and nothing left."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab.core import deltas
from trimtab.core.attach import rearrange
from trimtab.core.deltas import Deltas
from trimtab.core.errors import UserError
from trimtab.core.state import state_of


class Net(nn.Module):
    """Two linears and a norm; `c_attn` is no fused projection here."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(12, 20, bias=bias), nn.LayerNorm(20), nn.Linear(20, 12, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.norm(self.up(x))))


def net(**adapters: Any) -> nn.Module:
    """A double-precision net with these adapters, none of them at its start."""
    torch.manual_seed(0)
    model = Net().double().eval()
    for seed, (name, method) in enumerate(adapters.items()):
        method, where = method if isinstance(method, tuple) else (method, "*up, *down")
        tt.attach(model, method, where, name=name, seed=seed)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def looped(model: nn.Module, rows: list[Any], x: Tensor) -> Tensor:
    """Each row alone, with its adapter for the whole batch."""
    done = []
    for at, names in enumerate(rows):
        tt.activate(model, names)
        done.append(model(x[at : at + 1]))
    return torch.cat(done)


def watched(monkeypatch: pytest.MonkeyPatch) -> list[set[Any]]:
    """Which groups every module ran through grouped products."""
    seen: list[set[Any]] = []
    real = deltas.grouped

    def spy(*args: Any) -> Any:
        out, names = real(*args)
        seen.append(names)
        return out, names

    monkeypatch.setattr(deltas, "grouped", spy)
    return seen


RANKS = {
    "a": tt.LoRA(rank=2, alpha=3),
    "b": tt.LoRA(rank=7, alpha=1, rank_power=0.5),
    "c": tt.LoRA(rank=4, ranks="down=3"),
    "d": tt.LoHa(rank=2),
    "e": tt.DoRA(rank=3),
    "f": tt.IA3(),
    "g": tt.LoRA(rank=2, start=tt.PiSSA()),
    "h": tt.VeRA(rank=5),
}
BATCHES = {
    "in order": ["a", "b", "c", "d"],
    "several rows each": ["a", "b", "a", "c", "b", "a"],
    "base rows": [None, "a", None, "b", "b"],
    "methods that loop": ["a", "e", "f", "b", None, "e"],
    "stacked": [("a", "b"), "a", ("b", "e"), ("a", "c")],
    "starts and shared": ["g", "h", "a", "h"],
    "one adapter": ["a", "a", "a"],
}


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad"])
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("shape", [(), (3,)], ids=["rows", "tokens"])
def test_a_mixed_batch_is_its_rows_alone(rows: list[Any], shape: tuple[int, ...], grad: bool) -> None:
    model = net(**RANKS)
    x = torch.randn(len(rows), *shape, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.set_grad_enabled(grad):
        wanted = looped(model, rows, x)
        tt.activate(model, rows)
        for _ in range(2):  # the second time from what is kept
            assert torch.allclose(model(x), wanted, atol=1e-12, rtol=0)


def test_it_is_the_equation_in_numpy() -> None:
    model = net(a=(tt.LoRA(rank=2, alpha=3), "*up"), b=(tt.LoRA(rank=5, alpha=1), "*up"))
    x = torch.randn(3, 12, dtype=torch.float64)
    tt.activate(model, ["b", None, "a"])
    with torch.no_grad():
        found = model.up(x).numpy()
    W, c = (one.detach().numpy() for one in (model.up.weight, model.up.bias))
    wanted = x.numpy() @ W.T + c
    for row, name, scale in ((0, "b", 1 / 5), (2, "a", 3 / 2)):
        A, B = (getattr(model.up.delta[name], letter).detach().numpy() for letter in "AB")
        wanted[row] += scale * (B @ (A @ x.numpy()[row]))
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_products_are_grouped_and_only_where_a_method_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(monkeypatch)
    model = net(**RANKS)
    with torch.no_grad():
        tt.activate(model, ["a", "e", "b", "f"])(torch.randn(4, 12, dtype=torch.float64))
    assert seen == [{("a",), ("b",)}] * 2


def test_gradients_are_those_of_the_rows_alone() -> None:
    model = net(a=RANKS["a"], b=RANKS["b"])
    rows = ["b", "a", "b"]
    x = torch.randn(3, 2, 12, dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad(looped(model, rows, x).square().sum(), [x, *trained(model)])
    found = torch.autograd.grad(tt.activate(model, rows)(x).square().sum(), [x, *trained(model)])
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-12, rtol=0)


def trained(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def test_rows_that_come_and_go_find_their_own_factors() -> None:
    model = net(**RANKS)
    generator = torch.Generator().manual_seed(2)
    names = [*RANKS, None]
    for _ in range(30):
        count = int(torch.randint(2, 9, (1,), generator=generator))
        rows = [names[int(torch.randint(len(names), (1,), generator=generator))] for _ in range(count)]
        x = torch.randn(count, 12, dtype=torch.float64, generator=generator)
        with torch.no_grad():
            rearrange(model, rows)
            found = model(x)
            kept = {key: value for key, value in state_of(model).kept.items() if isinstance(key, int)}  # type: ignore[union-attr]
            wanted = looped(model, rows, x)
            state_of(model).kept.update(kept)  # type: ignore[union-attr]
        assert torch.allclose(found, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("write", ["in place", "a new tensor", "through data"])
def test_changed_values_are_seen(write: str) -> None:
    model = net(a=RANKS["a"], b=RANKS["b"])
    x, rows = torch.randn(2, 12, dtype=torch.float64), ["a", "b"]
    with torch.no_grad():
        before = tt.activate(model, rows)(x)
        if write == "in place":
            model.up.delta["a"].B.mul_(2)
        elif write == "a new tensor":
            model.up.delta["a"].B = nn.Parameter(2 * model.up.delta["a"].B)
        else:
            model.up.delta["a"].B.data.mul_(2)
            tt.activate(model, rows)
        found = model(x)
        assert not torch.allclose(found[0], before[0])
        assert torch.equal(found[1], before[1])
        assert torch.allclose(found, looped(model, rows, x), atol=1e-12, rtol=0)


def test_memory_returns_when_adapters_leave() -> None:
    model = net(a=RANKS["a"], b=RANKS["b"])
    gc.collect()
    before = live()
    for number in range(20):
        tt.attach(model, tt.LoRA(rank=4), "*up, *down", name=f"more-{number}")
    with torch.no_grad():
        tt.activate(model, [f"more-{number}" for number in range(20)])(torch.randn(20, 12, dtype=torch.float64))
    stacks = next(value for key, value in state_of(model).kept.items() if isinstance(key, int))  # type: ignore[union-attr]
    watch = [weakref.ref(stacks.A), weakref.ref(model.up.delta["more-3"].A)]
    del stacks
    for number in range(20):
        tt.detach(model, f"more-{number}")
    gc.collect()
    assert [one() for one in watch] == [None, None]
    assert live() == before


def live() -> int:
    return sum(issubclass(type(one), Tensor) for one in gc.get_objects())


def test_a_copy_has_stacks_of_its_own() -> None:
    model = net(a=RANKS["a"], b=RANKS["b"])
    x, rows = torch.randn(2, 12, dtype=torch.float64), ["a", "b"]
    with torch.no_grad():
        wanted = tt.activate(model, rows)(x)
        other = copy.deepcopy(model)
        assert not any(isinstance(key, int) for key in state_of(other).kept)  # type: ignore[union-attr]
        other.up.delta["a"].B.zero_()
        assert not torch.allclose(other(x), wanted)
        assert torch.equal(model(x), wanted)


def test_dropout_in_training_keeps_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(monkeypatch)
    model = net(a=tt.LoRA(rank=2, dropout=0.5), b=tt.LoRA(rank=3, dropout=0.5))
    x = torch.randn(2, 12, dtype=torch.float64)
    tt.activate(model.train(), ["a", "b"])(x)
    assert seen == [set(), set()]
    model.eval()(x)
    assert seen[2:] == [{("a",), ("b",)}] * 2


def test_a_quantized_base_and_fused_slices() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=30, n_positions=16)).eval()
    tt.quantize(model, tt.Absmax())
    for name, where in (("a", "q, v"), ("b", "all-linear"), ("c", "v, o")):
        tt.attach(model, tt.LoRA(rank=2, start="B"), where, name=name)
        for one in model.parameters():
            if one.requires_grad:
                one.data = torch.randn(one.shape, generator=torch.Generator().manual_seed(len(where)))
    ids, rows = torch.arange(24).reshape(4, 6), ["b", "a", "c", "b"]
    with torch.no_grad():
        wanted = torch.cat([tt.activate(model, name)(ids[i : i + 1]).logits for i, name in enumerate(rows)])
        assert torch.allclose(tt.activate(model, rows)(ids).logits, wanted, atol=1e-5)


def test_raw_weights_of_other_adapters_do_not_stand_in_the_way() -> None:
    model = net(a=RANKS["a"], b=RANKS["b"], raw=(tt.LNTuning(), "*norm"))
    x, rows = torch.randn(3, 12, dtype=torch.float64), ["a", None, "b"]
    with torch.no_grad():
        assert torch.allclose(tt.activate(model, rows)(x), looped(model, rows, x), atol=1e-12, rtol=0)
        with pytest.raises(UserError, match="read raw"):
            tt.activate(model, ["a", "raw"])


def test_the_loop_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(**RANKS).float()
    rows = ["a", "b", None, "c", "a", "d"]
    x = torch.randn(6, 4, 12)
    with torch.no_grad():
        found = tt.activate(model, rows)(x)
        monkeypatch.setattr(deltas, "grouped", lambda key, state, used, x, y, *rest: (y, set()))
        assert torch.allclose(tt.activate(model, rows)(x), found, atol=1e-6)
    assert isinstance(model.up.delta, Deltas)


def test_factors_are_stacked_once_and_only_those_that_join(monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.core import grouped

    made: list[int] = []
    real = grouped.factors_of
    monkeypatch.setattr(grouped, "factors_of", lambda *given: (made.append(1), real(*given))[1])
    model = net(a=RANKS["a"], b=RANKS["b"], c=RANKS["c"])
    x = torch.randn(3, 12, dtype=torch.float64)
    counts, places = [], []
    with torch.no_grad():
        for rows in (["a", "b", None], ["b", "a", "a"], ["b", "c", "b"], ["c", "c", "b"]):
            rearrange(model, rows)
            model(x)
            counts.append(len(made))
            places.append(state_of(model).kept[id(model.up.delta)].A.data_ptr())  # type: ignore[union-attr]
    assert counts == [4, 4, 6, 6]  # two adapters at two sites; then one that joins at both
    assert places[0] == places[1]
    assert places[2] == places[3]
