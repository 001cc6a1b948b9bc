"""Weights that train in eight bits: what rounding at random does to steps, and how the parameter behaves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import trimtab as tt
from trimtab.core.registry import names
from trimtab.core.rounded import GROUP, Rounded, Values, kept_in


def rounded(*shape: int, seed: int = 0) -> tuple[Rounded, torch.Tensor]:
    W = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return Rounded(W, torch.tensor(7 + seed)), W


def tuned(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return tt.attach(nn.Sequential(nn.Linear(96, 64, bias), nn.ReLU(), nn.Linear(64, 8, bias)), tt.FullInt8())


def test_starts_at_the_nearest_code() -> None:
    made, W = rounded(5, 300)
    grid = made.scale.repeat_interleave(GROUP)[: W.numel()].view_as(W)
    assert ((made.dense() - W).abs() <= 0.5001 * grid).all()


@pytest.mark.parametrize("shape", [(4, GROUP), (3, 100), (1, 1), (7, 37)])
def test_writing_is_right_in_the_mean_and_within_one_code(shape: tuple[int, int]) -> None:
    made, W = rounded(*shape)
    summed, times = torch.zeros_like(W), 400
    for _ in range(times):
        made.write(W)
        grid = made.scale.repeat_interleave(GROUP)[: W.numel()].view_as(W)
        assert ((made.dense() - W).abs() <= 1.001 * grid).all()
        summed += made.dense()
    assert ((summed / times - W).abs() <= 5 * 0.5 * grid / times**0.5 + 1e-6).all()


def test_steps_far_below_a_code_add_up() -> None:
    """300 steps of a hundredth of a code each; rounded to the nearest, none of them would be seen."""
    made, _ = rounded(16, GROUP)
    start, step = made.dense(), float(made.scale.mean()) / 100
    optimizer = tt.Optimizer([made.values], tt.SGD(momentum=0), lr=step)
    grad = torch.zeros(16, GROUP)
    grad[:, : GROUP // 2] = 1.0  # if all moved, so would their grid
    for _ in range(300):
        made.values.grad = grad
        optimizer.step()
    moved = (start - made.dense()) / step
    assert 285 < moved[grad > 0].mean() < 315
    assert moved[grad == 0].mean().abs() < 15


def test_a_step_rounds_once_and_is_the_dense_one_within_a_code() -> None:
    model, dense = tuned(), tt.attach(nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 8)), tt.Full())
    kept = [module for module in model.modules() if isinstance(module, Rounded)]
    twins = [p for name, p in dense.named_parameters() if name.endswith(".V")]
    for one, twin in zip(kept, twins, strict=True):
        twin.data.copy_(one.dense())
    for one, twin in zip(kept, twins, strict=True):
        grad = torch.randn(twin.shape, generator=torch.Generator().manual_seed(3))
        one.values.grad, twin.grad = grad, grad.clone()
    turns = [int(one.turn) for one in kept]
    for what in (model, dense):
        tt.Optimizer(what, tt.QGaLore(rank=4), lr=0.01, weight_decay=0.1).step()
    assert [int(one.turn) for one in kept] == [turn + 1 for turn in turns]
    for one, twin in zip(kept, twins, strict=True):
        grid = one.scale.max()
        assert ((one.dense() - twin).abs() <= 1.001 * grid).all()
        assert not torch.equal(one.dense(), twin)


@pytest.mark.parametrize(
    ("make", "rate"), [(torch.optim.SGD, 1.0), (torch.optim.AdamW, 0.01), (torch.optim.Adagrad, 0.01)]
)
def test_torchs_own_optimizers_train_it(make: Callable[..., torch.optim.Optimizer], rate: float) -> None:
    model = tuned()
    x, target = torch.randn(64, 96), torch.randn(64, 8)
    optimizer = make([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(60):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", names("optim"))
def test_every_optimizer_steps_it_as_a_dense_weight(name: str) -> None:
    """Within one code of what the same rule makes of the decoded weight."""
    made, _ = rounded(64, GROUP)
    dense = nn.Parameter(made.dense())
    optimizers = []
    for what in (made.values, dense):
        optimizers.append(tt.Optimizer([("B", what)], name, lr=0.003, weight_decay=0.1))
        (what * torch.linspace(-1, 1, GROUP)).sum().backward()
    for one in optimizers:
        one.step()
    assert not torch.equal(dense, rounded(64, GROUP)[0].dense())
    assert ((made.dense() - dense).abs() <= 1.001 * made.scale[:, None]).all()


def test_draws_move_no_generator_and_are_the_same_again() -> None:
    one, W = rounded(8, GROUP)
    other = copy.deepcopy(one)
    before = torch.get_rng_state()
    one.write(W)
    torch.manual_seed(99)
    other.write(W)
    assert torch.equal(one.codes, other.codes)  # type: ignore[arg-type]
    torch.manual_seed(0)
    torch.set_rng_state(before)
    one.write(W)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(one.codes, other.codes)  # type: ignore[arg-type]


def test_a_value_a_byte_in_memory_and_in_the_file(tmp_path: Path) -> None:
    model = tt.attach(nn.Sequential(nn.Linear(512, 512, bias=False)), tt.FullInt8())
    (p,) = [p for p in model.parameters() if p.requires_grad]
    assert isinstance(p, Values)
    assert p.untyped_storage().nbytes() == 0
    assert sum(one.nbytes for one in kept_in(p)) == 512 * 512 * (1 + 8 / GROUP) + 8
    tt.save(model, tmp_path)
    assert (tmp_path / "adapter.safetensors").stat().st_size < 1.05 * 512 * 512


@pytest.mark.parametrize("trainable", [True, False])
def test_a_loaded_one_trains_on(trainable: bool, tmp_path: Path) -> None:
    x = torch.randn(4, 96)
    model = tuned()
    tt.save(model, tmp_path)
    fresh = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 8))
    tt.load(fresh, tmp_path, trainable=trainable)
    assert any(p.requires_grad for p in fresh.parameters()) == trainable
    assert torch.equal(fresh(x), model(x))
    if trainable:
        for one in (model, fresh):
            one(x).square().mean().backward()
            tt.Optimizer(one, "adamw", lr=0.01).step()
        assert torch.equal(fresh(x), model(x))


def test_a_state_dict_has_the_codes_and_puts_them_back() -> None:
    model, other = tuned(), tuned()
    x = torch.randn(4, 96)
    tt.Optimizer(model, "sgd", lr=0.1).zero_grad()
    model(x).sum().backward()
    tt.Optimizer(model, "sgd", lr=0.1).step()
    assert not torch.equal(model(x), other(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(x), other(x))
    with pytest.raises(RuntimeError, match=r"V\.codes"):
        other.load_state_dict({key: value for key, value in model.state_dict().items() if "codes" not in key})


def test_an_inactive_layer_keeps_its_codes_and_gets_no_gradient() -> None:
    model = tuned()
    first, last = (module for module in model.modules() if isinstance(module, Rounded))
    first.values.requires_grad_(False)
    before = first.codes.clone()  # type: ignore[operator]
    model(torch.randn(4, 96)).square().mean().backward()
    tt.Optimizer([last.values], "sgd", lr=0.1).step()
    assert first.values.grad is None
    assert torch.equal(first.codes, before)  # type: ignore[arg-type]


def test_backward_keeps_no_dense_weight() -> None:
    kept: list[int] = []
    model = tt.attach(nn.Sequential(nn.Linear(512, 512, bias=False)), tt.FullInt8())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        model(torch.randn(3, 512)).sum().backward()
    assert max(kept, default=0) == 3 * 512


def test_moving_a_model_casts_what_is_read_and_not_the_grid() -> None:
    model = tuned()
    was = [module.dense() for module in model.modules() if isinstance(module, Rounded)]
    model.to(torch.bfloat16)
    for module, before in zip((m for m in model.modules() if isinstance(m, Rounded)), was, strict=True):
        assert module.scale.dtype == torch.float32
        assert module.values.dtype == torch.bfloat16
        assert torch.equal(module.dense(), before.bfloat16())


def test_a_parameter_that_was_replaced_is_an_error() -> None:
    model = tuned()
    module = next(module for module in model.modules() if isinstance(module, Rounded))
    module.values = nn.Parameter(torch.zeros(64, 96))
    with pytest.raises(tt.UserError, match="FSDP2"):
        model(torch.randn(2, 96))


def test_a_stack_of_experts_is_refused() -> None:
    from trimtab import laws

    host = next(host for host in laws.zoo() if host.kind == "experts")
    with pytest.raises(tt.UserError, match="keeps only single ones"):
        tt.attach(host.build(), tt.FullInt8(), host.where)
