"""What every registered transform gets tested for, and the rules against equations written separately in NumPy."""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab.core.errors import UserError
from trimtab.core.registry import find, from_json, names, to_json
from trimtab.core.transform import Transform, flat

ORACLES = Path(__file__).parent.parent / "oracles" / "optim"
SMALL: dict[str, dict[str, Any]] = {
    "adam8": {"block_size": 8, "smallest": 8},
    "galore": {"rank": 2, "gap": 3},
    "q_galore": {"rank": 2, "gap": 2, "recent": 2, "inner": "adamw"},
    "apollo": {"rank": 2, "gap": 3},
    "apollo_mini": {"gap": 3, "scale": 4.0},
    "paged": {"smallest": 8},
    "chain": {"parts": ("clip", "adafactor", "relative")},
}
"""Settings that show something on tensors of a few entries."""
SHAPES = ((6, 4), (3, 7), (5,), (2, 3, 4))
RATES = {"sgd": 0.02, "decay": 0.1, "clip": 0.1, "relative": 0.1}


def rule(name: str) -> Transform:
    return find(name, "optim")(**SMALL.get(name, {}))


def oracle_of(name: str) -> Any:
    path = ORACLES / f"{name}.py"
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location(f"oracle_of_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.oracle


class Parameters(nn.Module):
    """Tensors of several shapes, and a quadratic of them all."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.B = nn.ParameterList(torch.randn(shape).to(dtype) for shape in SHAPES)
        self.goal = [torch.randn(shape).to(dtype) for shape in SHAPES]
        self.slope = [torch.rand(shape).to(dtype) + 0.5 for shape in SHAPES]

    def forward(self) -> Tensor:
        pairs = zip(self.B, self.goal, self.slope, strict=True)
        return torch.stack([(slope * (p - goal) ** 2).sum() for p, goal, slope in pairs]).sum()


def optimizer(model: nn.Module, made: Transform, name: str, lr: float | None = None) -> tt.Optimizer:
    return tt.Optimizer(model, made, lr=RATES.get(name, 0.05) if lr is None else lr)


def steps(model: nn.Module, driver: torch.optim.Optimizer, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        loss = model()
        loss.backward()
        driver.step()
        driver.zero_grad()
        losses.append(loss.item())
    return losses


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", names("optim"))
def test_it_descends_a_quadratic(name: str) -> None:
    model = Parameters()
    losses = steps(model, optimizer(model, rule(name), name), 150)
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("name", names("optim"))
def test_the_state_has_the_bytes_of_its_formula(name: str) -> None:
    model, made = Parameters(), rule(name)
    driver = optimizer(model, made, name)
    for _ in range(2):
        steps(model, driver, 1)
        for p in model.parameters():
            held = sum(one.nbytes for one in flat(driver.state[p]).values())
            assert held == made.state_bytes(p.shape), tuple(p.shape)
    assert driver.state_bytes() == sum(made.state_bytes(p.shape) for p in model.parameters())


@pytest.mark.parametrize("name", names("optim"))
def test_resumed_is_uninterrupted_bit_for_bit(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    whole, broken = Parameters(), Parameters()
    steps(whole, optimizer(whole, rule(name), name), 9)
    first = optimizer(broken, rule(name), name)
    steps(broken, first, 4)
    known = first.state_dict()
    tensors = {f"{index}.{key}": value for index, state in known["state"].items() for key, value in state.items()}
    save_file({key: value.clone() for key, value in tensors.items()} | {"none": torch.zeros(1)}, tmp_path / "state")
    first.release()
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(tmp_path / "state").items():
        if key != "none":
            index, _, entry = key.partition(".")
            state.setdefault(int(index), {})[entry] = value
    torch.manual_seed(99)  # nothing may depend on where the generator stands
    second = optimizer(broken, rule(name), name)
    second.load_state_dict({"state": state, "param_groups": second.state_dict()["param_groups"]})
    steps(broken, second, 5)
    assert same(whole, broken)


@pytest.mark.parametrize("name", names("optim"))
def test_in_backward_is_a_step(name: str) -> None:
    if name == "in_backward":
        pytest.skip("it is the other side of this comparison")
    plain, hooked = Parameters(), Parameters()
    made = rule(name)
    inside = made if made.in_backward else find("in_backward", "optim")(inner=made)
    driver = optimizer(plain, find("chain", "optim")() if made.in_backward else made, name)
    driver.rule = made  # LOMO and AdaLomo without their hooks
    steps(plain, driver, 6)
    steps(hooked, optimizer(hooked, inside, name), 6)
    assert same(plain, hooked)


@pytest.mark.parametrize("name", names("optim"))
def test_a_parameter_in_bf16_keeps_its_type_and_a_state_in_fp32(name: str) -> None:
    model = Parameters(torch.bfloat16)
    driver = optimizer(model, rule(name), name)
    before = model().item()
    steps(model, driver, 20)
    assert model().item() < before
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert not any(one.dtype == torch.bfloat16 for state in driver.state.values() for one in flat(state).values())


@pytest.mark.parametrize("name", names("optim"))
def test_it_says_what_it_is(name: str) -> None:
    made = rule(name)
    text = inspect.getdoc(type(made)) or ""
    assert "=" in text.splitlines()[0], "the first line is the equation"
    assert "bytes" in text
    assert "Cost" in text or "cost" in text
    assert type(made).paper in text
    assert from_json(to_json(made)) == made
    assert getattr(tt, type(made).__name__) is type(made)
    assert made.relative_rate > 0


@pytest.mark.parametrize("name", [name for name in names("optim") if oracle_of(name) is not None])
@pytest.mark.parametrize("shape", [(6, 4), (3, 7), (5,)])
def test_it_equals_its_oracle(name: str, shape: tuple[int, ...]) -> None:
    made, draw = rule(name), np.random.default_rng(3)
    if name == "galore":  # old moments meet new directions, whose signs no SVD settles
        made = replace(made, gap=100)  # type: ignore[type-var]
    gradients = [draw.standard_normal(shape) * 0.3 ** (step % 3) for step in range(7)]
    weights = [draw.standard_normal(shape) for _ in gradients]
    s = made.init(torch.zeros(shape, dtype=torch.float64))
    expected = oracle_of(name)(gradients, weights, made)
    for g, w, u in zip(gradients, weights, expected, strict=True):
        found = made.update(torch.tensor(g), s, torch.tensor(w)).numpy()
        np.testing.assert_allclose(found, u, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("change", [{"beta1": 0.5}, {"beta1": 0.9, "power": 0.5}])
def test_adafactor_equals_its_oracle_with_a_first_moment(change: dict[str, Any]) -> None:
    made, draw = replace(tt.Adafactor(), **change), np.random.default_rng(4)
    gradients = [draw.standard_normal((4, 5)) for _ in range(5)]
    s = made.init(torch.zeros(4, 5, dtype=torch.float64))
    for g, u in zip(gradients, oracle_of("adafactor")(gradients, gradients, made), strict=True):
        np.testing.assert_allclose(made.update(torch.tensor(g), s, torch.zeros(4, 5)).numpy(), u, rtol=1e-9)


def test_adamw_equals_torchs_after_100_steps_with_decay_clipping_and_a_schedule() -> None:
    models = [Parameters() for _ in range(3)]
    drivers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(models[0].parameters(), lr=0.02, weight_decay=0.1),
        tt.Optimizer(models[1], tt.AdamW(), lr=0.02, weight_decay=0.1),
        tt.Optimizer(models[2], tt.Chain((tt.AdamW(), tt.Decay(0.1))), lr=0.02),
    ]
    schedules = [torch.optim.lr_scheduler.LinearLR(driver, 1.0, 0.1, 100) for driver in drivers]
    for model, driver, schedule in zip(models, drivers, schedules, strict=True):
        for _ in range(100):
            model().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            driver.step()
            driver.zero_grad()
            schedule.step()
    for model in models[1:]:
        for p, q in zip(models[0].parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_equals_torchs_and_decay_before_it_is_an_l2_penalty(momentum: float) -> None:
    one, other = Parameters(), Parameters()
    steps(one, torch.optim.SGD(one.parameters(), lr=0.01, momentum=momentum, weight_decay=0.1), 20)
    steps(other, tt.Optimizer(other, tt.Chain((tt.Decay(0.1), tt.SGD(momentum))), lr=0.01), 20)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_adafactor_equals_transformers() -> None:
    from transformers.optimization import Adafactor

    one, other = Parameters(), Parameters()
    settings = {"scale_parameter": True, "relative_step": False, "warmup_init": False}
    steps(one, Adafactor(one.parameters(), lr=0.05, **settings), 10)
    steps(other, tt.Optimizer(other, tt.Chain((tt.Adafactor(), tt.Relative())), lr=0.05), 10)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_lora_plus_raises_the_rate_of_output_factors_and_vectors() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    tt.attach(model, [tt.LoRA(rank=2).at("0"), tt.Full().at("2")])
    driver = tt.Optimizer(model, tt.LoRAPlus(ratio=8), lr=0.01)
    group = driver.param_groups[0]
    factors = {name.rpartition(".")[2]: by for name, by in zip(group["param_names"], group["factors"], strict=True)}
    assert factors == {"A": 1.0, "B": 8.0, "V": 1.0, "c": 8.0}
    group["lr"] = 0.001  # a schedule sets the one rate of the group, and the ratio stays
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model(torch.randn(3, 6)).sum().backward()
    driver.step()
    moved = {
        name.rpartition(".")[2]: (before[name] - p).abs().max().item()
        for name, p in model.named_parameters()
        if name in before
    }
    assert moved["B"] == pytest.approx(0.008, rel=1e-3)
    assert moved["c"] == pytest.approx(0.008, rel=1e-3)
    assert moved["V"] == pytest.approx(0.001, rel=1e-3)
    assert tt.LoRAPlus().rate("model.q_proj.lora_embedding_B.default", torch.ones(2, 2)) == 16
    with pytest.raises(UserError, match="by the names of parameters"):
        tt.Optimizer(model.parameters(), tt.LoRAPlus())


def test_groups_have_their_own_decay_and_a_tensor_without_gradient_stays() -> None:
    a, b, c = (nn.Parameter(torch.ones(2)) for _ in range(3))
    driver = tt.Optimizer([{"params": [a], "weight_decay": 0.5}, {"params": [b, c]}], tt.SGD(0.0), lr=0.1)
    a.grad, b.grad = torch.zeros(2), torch.zeros(2)
    driver.step()
    assert torch.equal(a, torch.full((2,), 0.95))
    assert torch.equal(b, torch.ones(2))
    assert torch.equal(c, torch.ones(2))
    assert c not in driver.state


def test_a_state_of_another_optimizer_is_refused_and_changes_nothing() -> None:
    model = Parameters()
    one, other = tt.Optimizer(model, tt.AdamW()), tt.Optimizer(model, tt.Lion())
    steps(model, one, 1)
    steps(model, other, 1)
    known = {key: value.clone() for key, value in flat(one.state[next(iter(one.state))]).items()}
    with pytest.raises(UserError, match=r"another optimizer than AdamW.*t, v"):
        one.load_state_dict(other.state_dict())
    assert all(torch.equal(value, known[key]) for key, value in flat(one.state[next(iter(one.state))]).items())


def test_transformers_trainer_takes_it(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    class Fit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(2, 1)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": ((self.line(x)[:, 0] - labels) ** 2).mean()}

    rows = [{"x": torch.randn(2), "labels": torch.tensor(1.0)} for _ in range(16)]
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        num_train_epochs=5,
        report_to=[],
        use_cpu=True,
        save_steps=10,
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="steps",
    )
    model = Fit()
    chosen = (tt.Optimizer, {"rule": tt.Lion(), "lr": 0.05})
    trainer = Trainer(model, arguments, train_dataset=rows, optimizer_cls_and_kwargs=chosen)  # type: ignore[arg-type]
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    resumed = Trainer(Fit(), arguments, train_dataset=rows, optimizer_cls_and_kwargs=chosen)  # type: ignore[arg-type]
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    torch.testing.assert_close(resumed.model.line.weight, model.line.weight)


def test_bad_settings_are_refused() -> None:
    for wrong in (lambda: tt.AdamW(beta1=1.0), lambda: tt.SGD(momentum=-0.1), lambda: tt.Clip(-1.0)):
        with pytest.raises(UserError, match="is not"):
            wrong()
    with pytest.raises(UserError, match=r"no optimizer named 'adamx'(.|\n)*adamw"):
        tt.Optimizer(Parameters(), "adamx")
