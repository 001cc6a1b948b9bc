"""The low-rank family beyond the laws: settings by site, counts at real sizes, and what happens over steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab.core.draw import site_at
from trimtab.core.part import plan
from trimtab.core.save import adapter_tensors
from trimtab.core.site import RawBase
from trimtab.core.state import State

SIZES = {"q_proj": (24, 24), "v_proj": (24, 12)}
X = torch.randn(6, 24, generator=torch.Generator().manual_seed(9))


class Pair(nn.Module):
    """Two sites of different shapes on one input."""

    def __init__(self) -> None:
        super().__init__()
        for name, (into, out) in SIZES.items():
            self.add_module(name, nn.Linear(into, out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.v_proj(x)], -1)


def made(name: str, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """The pair with a method on it, and the delta of each site."""
    torch.manual_seed(0)
    model: Any = tt.attach(Pair(), tt.methods()[name](**settings), "*_proj").train()
    return model, {site: getattr(model, site).delta["default"] for site in SIZES}


def trained(model: Any) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def run(model: Any, deltas: dict[str, Any], steps: range, optimizer: Any = None) -> None:
    """The training loop's order: backward, penalty, step, on_step, gradients cleared."""
    optimizer = optimizer or torch.optim.SGD(trained(model), lr=0.1)
    for step in steps:
        (model(X) - X.repeat(1, 2)[:, :36].roll(step)).square().mean().backward()
        for delta in deltas.values():
            term = delta.method.penalty(delta)
            if term is not None:
                term.backward()
        optimizer.step()
        for delta in deltas.values():
            delta.method.on_step(delta, step)
        optimizer.zero_grad()


# ------------------------------------------------------------------------------------------------ settings and sizes


def test_rank_and_alpha_by_site() -> None:
    _, deltas = made("lora", rank=4, alpha=8.0, ranks="q_proj=2, *=3", alphas="v_*=6")
    assert [deltas[site].A.shape[0] for site in SIZES] == [2, 3]
    assert [float(deltas[site].alpha) for site in SIZES] == [8.0, 6.0]
    method = deltas["v_proj"].method
    with torch.no_grad():
        deltas["v_proj"].B.normal_()
    B, A = method.factors(deltas["v_proj"], (12, 24))
    assert torch.allclose(B @ A, 2.0 * deltas["v_proj"].B @ deltas["v_proj"].A)


def test_settings_by_site_come_back_from_a_file(tmp_path: Any) -> None:
    model, _ = made("lora", rank=4, ranks="q_proj=2", alphas="v_proj=6")
    with torch.no_grad():
        for parameter in trained(model):
            parameter.normal_()
    tt.save(model, tmp_path)
    torch.manual_seed(0)
    assert torch.equal(tt.load(Pair(), tmp_path)(X), model(X))


@pytest.mark.parametrize(
    "name, settings, said",
    [
        ("lora", {"ranks": "k_proj=2"}, "no site is meant by k_proj"),
        ("lora", {"ranks": "q_proj"}, "cannot read q_proj"),
        ("lora", {"ranks": "q_proj=1.5"}, "whole numbers"),
        ("lora", {"alphas": "q_proj=-1"}, "cannot read q_proj=-1"),
        ("lora", {"start": "C"}, "names no factor"),
        ("lora_fa", {"rank": 0}, "rank=0"),
        ("vera", {"dropout": 2.0}, "dropout=2.0"),
        ("lora_xs", {"rank": 13}, "12 singular vectors"),
        ("adalora", {"rank": 4, "target": 5}, "target=5"),
        ("gralora", {"rank": 5, "blocks": 2}, "does not split"),
        ("dylora", {"rank": 4, "lowest": 5}, "lowest=5"),
        ("vb_lora", {"k": 300}, "k=300"),
        ("relora", {"every": 0}, "every=0"),
        ("lokr", {"rank": 0}, "rank=0"),
        ("mora", {"rank": 0}, "rank=0"),
        ("hira", {"rank": 0}, "rank=0"),
        ("delta_lora", {"warmup": -1}, "warmup=-1"),
        ("lora_drop", {"keep": 1.5}, "keep=1.5"),
    ],
)
def test_what_a_user_can_get_wrong(name: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(tt.UserError, match=said):
        made(name, **settings)


QV = 28 * (3072 + 1024)
"""Outputs of q and v in all layers."""


@pytest.fixture(scope="module")
def llama() -> Any:
    """Llama-3.2-3B on the meta device: q and v are (3072, 3072) and (1024, 3072), 28 layers."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "vocab_size": 128256}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=24, num_key_value_heads=8, tie_word_embeddings=True)
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize(
    "name, settings, expected",
    [
        ("lora", {"rank": 32}, 9_175_040),
        ("lora", {"rank": 64, "rank_power": 0.5}, 18_350_080),
        ("magnitude", {"inner": tt.LoRA(rank=32)}, 9_289_728),
        ("ia3", {}, 286_720),
        ("ln_tuning", {}, 175_104),
        ("prefix_tuning", {"length": 200, "hidden": None}, 11_468_800),
        ("prompt_tuning", {"length": 200, "start": "random"}, 614_400),
        ("llama_adapter", {"length": 100}, 8_601_628 + 28 * 23),  # PEFT has one gate a layer, the paper one a head
        ("relora", {"rank": 32}, 9_175_040),
        ("delta_lora", {"rank": 32}, 9_175_040),
        ("dylora", {"rank": 32}, 9_175_040),
        ("qa_lora", {"rank": 16, "group_size": 32}, 28 * 2 * 16 * 3072 // 32 + 16 * QV),
        ("ssf", {}, 2 * QV),
        ("output_bias", {}, QV),
        ("full", {}, 3072 * QV),
        ("lora_fa", {"rank": 32}, 3_670_016),
        ("vera", {"rank": 256}, 129_024),
        ("adalora", {"rank": 64, "target": 32}, 18_353_664),
        ("loha", {"rank": 32}, 18_350_080),
        ("lokr", {"rank": 32, "factor": 4}, 2_294_656),
        ("randlora", {"rank": 32}, 9_289_728),
        ("vb_lora", {}, 1_212_416),
        ("lora_drop", {"rank": 32}, 9_175_040 + 32 * (2 * 3072 + 3072 + 1024)),
        ("gralora", {"rank": 32}, 9_175_040),
        ("hira", {"rank": 32}, 9_175_040),
        ("lora_xs", {"rank": 32}, 28 * 2 * 32 * 32),
        ("oft", {"block_size": 96}, 8_171_520),
        ("boft", {"block_size": 4, "factors": 1}, 802_816),
        ("shira", {"rank": 32}, 9_175_040),
        ("miss", {"rank": 64}, 7_340_032),
        ("miss", {"rank": 64, "columns": 64}, 229_376),
        ("bat", {"block_size": 64}, 7_340_032),
        ("fourier_ft", {"coefficients": 1000}, 56_000),
        ("hra", {"rank": 8}, 28 * 2 * 8 * 3072),
        ("c3a", {"block_size": 256}, 3072 * QV // 256),
        ("svft", {"pattern": "plain"}, QV),
        ("svft", {"pattern": "banded", "width": 2}, 5 * QV - 28 * 2 * 6),
        ("road", {}, QV),
        ("mora", {"rank": 8}, 28 * (222**2 + 180**2)),
    ],
)
def test_counts_at_the_sizes_of_a_real_model(name: str, settings: dict[str, Any], expected: int, llama: Any) -> None:
    """Of the formula, and of what is attached; most are those of PEFT's published runs on this model."""
    method = tt.methods()[name](**settings)
    where = None if name in ("ia3", "llama_adapter", "ln_tuning", "prefix_tuning", "prompt_tuning") else "q, v"
    (part,) = plan(llama, method, where)
    sites = [site_at(llama, State(), place, index) for index, place in enumerate(part.places)]
    assert sum(method.count(site) for site in sites) + method.count_shared(sites) == expected
    tt.attach(llama, method, where)
    found = sum(parameter.numel() for parameter in trained(llama))
    tt.detach(llama)
    assert found == expected


@pytest.mark.parametrize(
    "name, settings",
    [
        ("lora", {"rank": 3}),
        ("lora_fa", {"rank": 3}),
        ("vera", {"rank": 5}),
        ("lora_xs", {"rank": 3}),
        ("loha", {"rank": 3}),
        ("randlora", {"rank": 5}),
        ("adalora", {"rank": 3, "target": 2}),
    ],
)
def test_row_norms_without_the_sum(name: str, settings: dict[str, Any]) -> None:
    """What Magnitude divides by, from the factors alone."""
    model, deltas = made(name, **settings)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(0.3 * torch.randn_like(parameter))
        for site, delta in deltas.items():
            base = RawBase(getattr(model, site).weight)
            dense = torch.linalg.vector_norm(delta.method.weight(base.weight, delta), dim=1)
            assert torch.allclose(delta.method.row_norm(base, delta), dense, rtol=1e-5)


# --------------------------------------------------------------------------------------------------- over the steps


def test_adalora_keeps_its_budget_over_all_sites_and_resumes() -> None:
    settings = {"rank": 6, "target": 2, "begin": 3, "end": 9, "every": 2}
    model, deltas = made("adalora", **settings)
    method = deltas["q_proj"].method
    optimizer = torch.optim.Adam(trained(model), lr=0.05)
    for step in range(1, 13):
        run(model, deltas, range(step, step + 1), optimizer)
        left = [int((delta.lambda_ != 0).sum()) for delta in deltas.values()]
        if step > 9 or (step > 3 and step % 2 == 1):
            assert sum(left) == int(2 * method.kept(step)), (step, left)
        if step == 6:
            state = {key: value.clone() for key, value in adapter_tensors(model, "default").items()}
            memory = torch.optim.Adam.state_dict(optimizer)
            memory = {"param_groups": memory["param_groups"], "state": {k: copy(v) for k, v in memory["state"].items()}}
    assert sum(left) == 4
    again, others = made("adalora", **settings)
    with torch.no_grad():
        for key, value in adapter_tensors(again, "default").items():
            value.copy_(state[key])
    optimizer = torch.optim.Adam(trained(again), lr=0.05)
    optimizer.load_state_dict(memory)
    run(again, others, range(7, 13), optimizer)
    assert torch.equal(again(X), model(X))


def copy(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.clone() for key, value in state.items()}


def test_adalora_scores_are_those_of_the_paper() -> None:
    """One step from zero averages: Ī = (1 − β) I, Ū = (1 − β)|I − Ī|, with the weight after the step."""
    model, deltas = made("adalora", rank=3, target=2, begin=5, end=9)
    delta = deltas["v_proj"]
    with torch.no_grad():
        delta.lambda_.fill_(0.5)
    model(X).square().mean().backward()
    delta.method.on_step(delta, 1)
    expected = torch.zeros(3)
    for w, mean in ((delta.lambda_, None), (delta.Q, 1), (delta.P, 0)):
        sensitivity = (w * w.grad).abs()
        smooth = 0.15 * sensitivity
        s = smooth * 0.15 * (sensitivity - smooth).abs()
        expected += s if mean is None else s.mean(mean)
    row = (delta.shared.key == delta.key).nonzero()[0, 0]
    assert torch.allclose(delta.shared.scores[1, row], expected.detach(), rtol=1e-5)


def test_adalora_does_not_pretend_to_work_without_gradients() -> None:
    _, deltas = made("adalora")
    with pytest.raises(tt.UserError, match="gradients"):
        deltas["q_proj"].method.on_step(deltas["q_proj"], 1)


def test_dylora_trains_leading_ranks_and_serves_any(tmp_path: Any) -> None:
    model, deltas = made("dylora", rank=4)
    method, delta = deltas["q_proj"].method, deltas["q_proj"]
    with torch.no_grad():
        delta.B.normal_()
    seen = set()
    for step in range(12):
        method.on_step(delta, step)
        b = method.rank_at(step + 1)
        seen.add(b)
        model.q_proj(X).square().mean().backward()
        assert delta.A.grad[:b].any(1).all()
        assert not delta.A.grad[b:].any()
        delta.A.grad = None
    assert seen == {1, 2, 3, 4}
    served, others = made("dylora", rank=4, used=2)
    with torch.no_grad():
        for one, other in zip(trained(served), trained(model), strict=True):
            one.copy_(other)
    served.eval()
    low = X @ others["q_proj"].A[:2].T @ others["q_proj"].B[:, :2].T
    wanted = tt.activate(served, None).q_proj(X) + 8.0 * low
    assert torch.allclose(tt.activate(served, "default").q_proj(X), wanted, atol=1e-5)


def test_relora_restarts_without_a_jump() -> None:
    model, deltas = made("relora", rank=2, every=3, restarts=2)
    delta = deltas["q_proj"]
    run(model, deltas, range(1, 3))
    before, A = model(X), delta.A.detach().clone()
    delta.method.on_step(delta, 3)
    deltas["v_proj"].method.on_step(deltas["v_proj"], 3)
    assert torch.allclose(model(X), before, atol=1e-6)
    assert not delta.B.any()
    assert not torch.equal(delta.A, A)
    assert torch.equal(delta.past_A[:2], A)
    assert [one is two for one, two in zip(delta.method.stale(delta, 3), (delta.A, delta.B), strict=True)] == [True] * 2
    assert [step for step in range(12) if delta.method.stale(delta, step)] == [3, 6]
    run(model, deltas, range(4, 9))
    update = delta.method.weight(torch.zeros(24, 24), delta)
    assert torch.linalg.matrix_rank(update.detach()) == 6


def test_delta_lora_is_the_papers_recurrence() -> None:
    """W moved step by step after the warmup, written out, against the closed form."""
    model, deltas = made("delta_lora", rank=2, alpha=4.0, share=2.0, warmup=2)
    delta, W = deltas["q_proj"], model.q_proj.weight.detach().clone()
    before = delta.B.detach() @ delta.A.detach()
    for step in range(1, 7):
        run(model, deltas, range(step, step + 1))
        now = delta.B.detach() @ delta.A.detach()
        if step > 2:
            W += 2.0 * 2.0 * (now - before)
        before = now
        wanted = X @ (W + 2.0 * now).T + model.q_proj.bias
        assert torch.allclose(model.q_proj(X), wanted, atol=1e-5), step


class Four(nn.Module):
    """Four sites of one shape and one of another, on inputs of very different size."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.ModuleList(nn.Linear(24, 24) for _ in range(4))
        self.narrow = nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        parts = [layer(scale * x) for layer, scale in zip(self.square, (5.0, 0.02, 2.0, 0.01), strict=True)]
        return torch.cat([sum(parts), self.narrow(0.03 * x)], -1)


def test_lora_drop_keeps_what_puts_out_most_and_shares_the_rest() -> None:
    torch.manual_seed(0)
    model: Any = tt.attach(Four(), tt.methods()["lora_drop"](rank=2, measure=3), "*").train()
    sites = [*model.square, model.narrow]
    deltas = {str(n): site.delta["default"] for n, site in enumerate(sites)}
    optimizer = torch.optim.Adam(trained(model), lr=0.05)
    expected = torch.zeros(5)
    seen: list[Tensor] = []
    handles = [site.register_forward_pre_hook(lambda m, args: seen.append(args[0])) for site in sites]
    for step in (1, 2, 3):
        seen.clear()
        updates = [
            delta.method.weight(torch.zeros(site.weight.shape), delta).detach()
            for site, delta in zip(sites, deltas.values(), strict=True)
        ]
        run_once(model, deltas, step, optimizer)
        expected += torch.stack([(x @ dW.T).square().sum() for x, dW in zip(seen, updates, strict=True)])
    for handle in handles:
        handle.remove()
    shared = deltas["0"].shared
    rows = [int((shared.key == delta.key).nonzero()) for delta in deltas.values()]
    assert torch.allclose(shared.scores.view(torch.float32)[rows], expected, rtol=1e-4)
    A = deltas["1"].A.detach().clone()
    run_once(model, deltas, 4, optimizer)
    order = expected.argsort(descending=True)
    share = (expected / expected.sum())[order].cumsum(0)
    important = set(order[: int((share < 0.9).sum()) + 1].tolist())
    assert {n for n, delta in enumerate(deltas.values()) if float(delta.own)} == important
    assert 1 not in important
    assert 3 not in important
    assert not torch.equal(A, deltas["1"].A)
    assert all(not delta.B.any() for delta in deltas.values())
    assert deltas["1"].method.stale(deltas["1"], 4)[0] is deltas["1"].A
    run_once(model, deltas, 5, optimizer)
    run_once(model, deltas, 6, optimizer)
    assert not deltas["1"].B.any(), "a site that shares leaves its own pair alone"
    assert shared.B_24_24.any()
    updates = [deltas[n].method.weight(torch.zeros(24, 24), deltas[n]) for n in ("1", "3")]
    assert torch.equal(*updates)
    assert updates[0].any()
    before = model.eval()(X)
    assert torch.allclose(tt.as_lora(model)(X), before, atol=1e-5)


@pytest.mark.parametrize("masters", [None, torch.float32], ids=["bf16", "fp32 masters"])
def test_lora_drop_measures_in_a_narrow_type_too(masters: Any) -> None:
    """Its sums are neither cast nor rounded: a hundred steps of one output, added up."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(24, 24)).bfloat16()
    tt.attach(model, tt.methods()["lora_drop"](rank=2), "*", dtype=masters).train()
    delta = model[0].delta["default"]
    with torch.no_grad():
        delta.B.fill_(1.0)
        for _ in range(100):
            model(X.bfloat16())
        update = 8.0 * delta.B.float() @ delta.A.float()
    expected = 100 * (X @ update.T).square().sum()
    assert float(delta.g.view(torch.float32)) == pytest.approx(float(expected), rel=0.02)


def run_once(model: Any, deltas: dict[str, Any], step: int, optimizer: Any) -> None:
    (model(X) - X.repeat(1, 2)[:, :36].roll(step)).square().mean().backward()
    optimizer.step()
    for delta in deltas.values():
        delta.method.on_step(delta, step)
        for tensor in delta.method.stale(delta, step):
            optimizer.state.pop(tensor, None)
    optimizer.zero_grad()


def test_what_a_method_does_over_the_steps_it_does_under_a_magnitude() -> None:
    """AdaLoRA's penalty and budget, ReLoRA's restarts."""
    Magnitude = tt.methods()["magnitude"]
    torch.manual_seed(0)
    inner = tt.methods()["adalora"](rank=4, target=2, begin=1, end=4, every=1)
    model: Any = tt.attach(Pair(), Magnitude(inner=inner), "*_proj").train()
    deltas = {site: getattr(model, site).delta["default"] for site in SIZES}
    optimizer = torch.optim.Adam(trained(model), lr=0.05)
    assert deltas["q_proj"].method.penalty(deltas["q_proj"]).requires_grad
    for step in range(1, 8):
        run(model, deltas, range(step, step + 1), optimizer)
    assert sum(int((delta.inner.lambda_ != 0).sum()) for delta in deltas.values()) == 4
    model = tt.attach(Pair(), Magnitude(inner=tt.methods()["relora"](rank=2, every=3)), "*_proj")
    delta = model.q_proj.delta["default"]
    assert [one is two for one, two in zip(delta.method.stale(delta, 3), (delta.inner.A, delta.inner.B), strict=True)]
    delta.method.on_step(delta, 3)
    assert torch.equal(model(X), tt.activate(model, None)(X))


@pytest.mark.parametrize("start", ["pissa", "milora", "olora"])
def test_a_magnitude_over_a_started_lora(start: str, tmp_path: Any) -> None:
    """Identity at the start, the same after saving; on weights to be quantized the codes lack what the start took."""
    method = tt.methods()["magnitude"](inner=tt.LoRA(rank=3, alpha=3.0, start=start))
    for format in (None, tt.NF4()):
        torch.manual_seed(0)
        dense = Pair()
        before = dense(X)
        model = tt.attach(dense, method, "*_proj", quantize=format)
        assert (model(X) - before).abs().max() < (1e-5 if format is None else 0.2) * before.abs().max()
        if format is not None:
            assert model.q_proj.code.tensors()["up"].shape == (24, 3)
        with torch.no_grad():
            for parameter in trained(model):
                parameter.add_(0.1 * torch.randn_like(parameter))
        tt.save(model, tmp_path / str(format is None))
        torch.manual_seed(0)
        assert torch.equal(tt.load(Pair(), tmp_path / str(format is None))(X), model(X))


def test_a_magnitude_takes_over_what_its_inner_method_says() -> None:
    Magnitude, methods = tt.methods()["magnitude"], tt.methods()
    assert Magnitude(inner=methods["lokr"]()).hosts == {"linear"}
    assert Magnitude().hosts == {"linear", "embedding", "conv"}
    assert "cost" in Magnitude(inner=methods["hira"]()).laws
    assert Magnitude(inner=tt.LoRA(start="eva")).statistics == "covariance"
    assert Magnitude(inner=methods["vera"]()).rate(1024) == methods["vera"]().rate(1024)
    with pytest.raises(tt.UserError, match="weight method"):
        Magnitude(inner=methods["houlsby"]())


def test_dora_is_never_built_densely() -> None:
    """Magnitude over every low-rank method, under the law of cost."""
    from trimtab import laws

    law = next(law for law in laws.LAWS if law.name == "cost")
    for name in ("lora", "lora_fa", "vera", "loha"):
        method = laws.small(tt.methods()["magnitude"](inner=tt.methods()[name]()))
        (case,) = (one for one in laws.cases(method) if law.speaks_of(one) and one.storage.name == "fp32")
        assert law.verdict(case), law.verdict(case)


def test_a_schedule_that_does_not_fit_a_run_is_laid_out_within_it() -> None:
    assert tt.AdaLoRA().over(1000) == tt.AdaLoRA()
    short = tt.AdaLoRA().over(40)
    assert (short.begin, short.end, short.every) == (4, 28, 2)
    assert (short.kept(3), short.kept(28)) == (12, 8)
    assert tt.DeltaLoRA().over(501) == tt.DeltaLoRA()
    assert tt.DeltaLoRA().over(500).warmup == 50
    assert tt.ReLoRA().over(3001) == tt.ReLoRA()
    assert tt.ReLoRA().over(400).every == 100
    assert tt.LoRA().over(1) == tt.LoRA()
    nested = tt.Magnitude(inner=tt.AdaLoRA())
    assert nested.over(40) == tt.Magnitude(inner=short)
    assert nested.over(1000) is nested
