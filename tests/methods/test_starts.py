"""Starts of LoRA: each equals its paper's equation, keeps the laws, and comes back from disk with the same codes."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab import laws
from trimtab.core.registry import find, from_json, names, to_json
from trimtab.core.site import RawBase, Site
from trimtab.core.start import Start, named

ORACLES = Path(__file__).parent.parent / "oracles"
OUT, IN, RANK = 40, 24, 4
EXACT = {"iterations": None}
STARTS: dict[str, Start] = {
    name: find(name, "start")(**(EXACT if name in ("pissa", "loftq", "lq_lora") else {})) for name in names("start")
}
TAKING = [name for name, start in STARTS.items() if start.takes_out and not start.needs_format]


def loaded(path: Path) -> Callable[..., Any]:
    """The oracle in a file."""
    spec = importlib.util.spec_from_file_location(f"oracle_{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[..., Any] = module.oracle
    return found


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decaying() -> Tensor:
    """A weight whose singular values differ enough for the oracle to find the same vectors."""
    U, _, Vt = torch.linalg.svd(matrix(OUT, IN), full_matrices=False)
    return U @ torch.diag(1.2 ** -torch.arange(IN, dtype=torch.float64)) @ Vt


class Two(nn.Module):
    """Two layers with a nonlinearity; the second reads what the first writes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(IN, OUT), nn.Linear(OUT, IN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def two() -> Two:
    torch.manual_seed(1)
    return Two()


INPUT = matrix(5, IN, seed=9).float()


def loss(model: nn.Module, batch: Any) -> Tensor:
    return model(batch["x"]).square().mean()


def measured(start: Start, model: nn.Module, where: str = "*") -> dict[str, Tensor]:
    """What a start wants to know of a model."""
    if start.statistics is None:
        return {}
    return getattr(tt, start.statistics)(model, [{"x": matrix(64, IN, seed=3).float()}], where, loss=loss)


def moved(model: nn.Module) -> nn.Module:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


# ---------------------------------------------------------------------------------------------------- the equations


@pytest.mark.parametrize("coded", [False, True], ids=["dense", "to be quantized"])
@pytest.mark.parametrize("name", STARTS)
def test_a_start_is_the_equation_of_its_paper(name: str, coded: bool) -> None:
    start = STARTS[name]
    if start.needs_format and not coded:
        pytest.skip("exists on weights that are about to be quantized only")
    format = tt.Absmax() if coded else None
    W, X, G = decaying(), matrix(90, IN, seed=5), matrix(OUT, IN, seed=6)
    known = {"covariance": X.mT @ X / len(X), "gradient": G, "fisher": G.square()}
    site = Site("layer", RawBase(W), "linear", statistics=known, format=format)
    scale = 0.5
    with torch.no_grad():
        p = start.begin(site, RANK, scale)
    begun = {key: value.detach().double().numpy() for key, value in p.items()}

    def store(M: Any) -> Any:
        return site.stored(torch.as_tensor(M)).numpy()

    numbers = {"X": X.numpy(), "gradient": G.numpy(), "fisher": G.square().numpy()}
    oracle = loaded(ORACLES / "starts" / f"{name}.py")
    product, taken = oracle(W.numpy(), RANK, scale, numbers, store if coded else None, start, begun)
    close = {"rtol": 1e-6, "atol": 1e-8}
    np.testing.assert_allclose(scale * begun["B"] @ begun["A"], product, **close)
    assert start.takes_out == ("A0" in p)
    if start.takes_out:
        np.testing.assert_allclose(scale * begun["B0"] @ begun["A0"], taken, **close)


@pytest.mark.parametrize("name", STARTS)
def test_every_start_has_an_oracle_a_docstring_and_a_json_form(name: str) -> None:
    start = STARTS[name]
    text = type(start).__doc__ or ""
    assert "=" in text.splitlines()[0]
    assert start.paper in text
    method = tt.LoRA(rank=3, start=start)
    assert from_json(to_json(method)) == method
    assert named(name) == find(name, "start")()
    assert tt.LoRA(start=name).begins == find(name, "start")()


@pytest.mark.parametrize("directions", ["ArB2r", "A2rBr", "ArBr"])
def test_lora_ga_takes_different_directions_for_both_factors(directions: str) -> None:
    G = matrix(OUT, IN, seed=6)
    site = Site("layer", RawBase(matrix(OUT, IN)), "linear", statistics={"gradient": G})
    start = find("lora_ga", "start")(directions=directions)
    A, B, _, _ = start.factors(site, RANK, 1.0)
    assert torch.linalg.vector_norm(B.mT @ G @ A.mT) < 1e-10 * torch.linalg.vector_norm(G)
    assert torch.allclose(torch.linalg.vector_norm(A, dim=1), torch.tensor(OUT**0.25 / 4, dtype=A.dtype))


def test_the_fast_svd_finds_nearly_the_principal_part() -> None:
    W = decaying()
    site = Site("layer", RawBase(W), "linear")
    exact, fast = (find("pissa", "start")(iterations=n).factors(site, RANK, 1.0) for n in (None, 8))
    torch.testing.assert_close(exact.B @ exact.A, fast.B @ fast.A, rtol=1e-3, atol=1e-3)


def test_measuring_the_inputs_leaves_out_padding_and_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(IN, OUT), nn.Dropout(0.5)).train()
    x, mask = matrix(3, 7, IN).float(), torch.ones(3, 7, dtype=torch.long)
    mask[0, :4] = 0
    C = tt.covariance(model, [{"x": x, "attention_mask": mask}], "*", loss=lambda m, b: m(b["x"]).sum())["0"]
    rows = x[mask.bool()]
    torch.testing.assert_close(C, rows.mT @ rows / len(rows))
    assert model.training
    assert not model[0]._forward_pre_hooks


# ------------------------------------------------------------------------------------------------- the laws, and merges

CHECKED = ("identity", "trains_only", "merge", "detach", "save", "quantized", "stacks", "oracle", "dtype", "copies")


@pytest.mark.parametrize("name", [name for name in STARTS if not STARTS[name].needs_format and name != "init_a"])
def test_the_laws_hold(name: str) -> None:
    method = tt.LoRA(rank=4, alpha=6.0, start=STARTS[name])
    hosts = [host for host in laws.zoo() if host.name in ("linear", "conv1d", "slice")]
    formats = [storage for storage in laws.storages() if storage.name in ("fp32", "bf16", "nf4")]
    pairs = laws.work(method, hosts, formats, loaded(ORACLES / "lora.py"))
    found = [law.verdict(case) for law, case in pairs if law.name in CHECKED]
    assert len(found) > 20
    assert not [str(verdict) for verdict in found if not verdict]


@pytest.mark.parametrize("name", TAKING)
def test_a_started_lora_is_a_plain_one_of_twice_the_rank(name: str) -> None:
    model = two()
    method = tt.LoRA(rank=RANK, alpha=6.0, start=STARTS[name])
    moved(tt.attach(model, method, "*", statistics=measured(STARTS[name], model)))
    before = model(INPUT)
    tt.as_lora(model)
    assert (model(INPUT) - before).abs().max() <= 1e-6 * before.abs().max()
    delta: Any = model.first.delta["default"]
    assert delta.A.shape == (2 * RANK, IN)
    assert delta.method == tt.LoRA(rank=2 * RANK, alpha=2.0 * RANK)
    assert delta.A.requires_grad


def test_the_plain_lora_fits_the_original_weights(tmp_path: Path) -> None:
    model = moved(tt.attach(two(), tt.LoRA(rank=RANK, start=STARTS["pissa"]), "*"))
    tuned = model(INPUT)
    tt.save(tt.as_lora(model), tmp_path)
    fresh = tt.load(two(), tmp_path)
    assert torch.equal(fresh(INPUT), model(INPUT))
    assert torch.allclose(fresh(INPUT), tuned, atol=1e-6)
    tt.merge(fresh)
    assert torch.allclose(fresh(INPUT), tuned, atol=1e-5)


@pytest.mark.parametrize("name", ["adalora", "vera", "loha", "relora", "lora_xs", "dylora"])
def test_every_low_rank_method_is_a_plain_lora(name: str) -> None:
    model = moved(tt.attach(two(), laws.small(find(name)()), "*")).eval()
    before = model(INPUT)
    tt.as_lora(model)
    assert "trimtab_shared" not in dict(model.named_modules())
    torch.testing.assert_close(model(INPUT), before, rtol=1e-5, atol=1e-6)


def test_what_is_no_product_is_refused() -> None:
    model = tt.attach(two(), tt.DoRA(rank=2), "*")
    with pytest.raises(tt.UserError, match="Magnitude"):
        tt.as_lora(model)


def test_dropout_is_on_the_change_so_the_start_is_the_identity_under_it() -> None:
    model = two()
    before = model(INPUT)
    tt.attach(model, tt.LoRA(rank=RANK, dropout=0.5, start="pissa"), "*").train()
    torch.testing.assert_close(model(INPUT), before, rtol=1e-5, atol=1e-6)


def test_eva_gives_more_ranks_where_a_direction_explains_more() -> None:
    model = two()
    start = find("eva", "start")(spread=2.0)
    known = {"first": torch.eye(IN), "second": torch.diag(torch.tensor([50.0] * 6 + [0.01] * (OUT - 6)))}
    tt.attach(model, tt.LoRA(rank=4, start=start), "*", statistics=known)
    ranks = [layer.delta["default"].A.shape[0] for layer in (model.first, model.second)]
    assert sum(ranks) == 8
    assert ranks[1] > ranks[0] >= 1
    assert model.first.delta["default"].method.scale_of(model.first.delta["default"]) == 4.0


def test_eva_with_given_ranks_saves_loads_and_converts(tmp_path: Path) -> None:
    model, start = two(), find("eva", "start")(spread=2.0)
    moved(tt.attach(model, tt.LoRA(rank=4, start=start), "*", statistics=measured(start, model)))
    tt.save(model, tmp_path)
    before = model(INPUT)
    assert torch.equal(tt.load(two(), tmp_path)(INPUT), before)
    torch.testing.assert_close(tt.as_lora(model)(INPUT), before, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------- weights that are quantized

ON_CODES = ["pissa", "milora", "loftq", "lq_lora", "lora_ga"]


def encoded(name: str, format: Any) -> nn.Module:
    model = two()
    method = tt.LoRA(rank=RANK, alpha=6.0, start=STARTS[name])
    return tt.attach(model, method, "*", statistics=measured(STARTS[name], model), quantize=format)


@pytest.mark.parametrize("format", [tt.NF4(), tt.NF4(double=True), tt.Affine(code_bits=3, group_size=8)], ids=repr)
@pytest.mark.parametrize("name", ON_CODES)
def test_codes_come_back_bit_for_bit(name: str, format: Any, tmp_path: Path) -> None:
    model = moved(encoded(name, format))
    with torch.no_grad():
        output = model(INPUT)
    tt.save(model, tmp_path)
    fresh = tt.load(two(), tmp_path)
    mine, its = model.state_dict(), fresh.state_dict()
    assert list(mine) == list(its)
    assert all(torch.equal(mine[key], its[key]) for key in mine)
    assert torch.equal(fresh(INPUT), output)
    assert [name for name, p in fresh.named_parameters() if p.requires_grad] == [
        name for name, p in model.named_parameters() if p.requires_grad
    ]
    again = tt.load(tt.detach(model), tmp_path)
    assert torch.equal(again(INPUT), output)
    merged = tt.merge(copy.deepcopy(again), quantized="dense")
    torch.testing.assert_close(merged(INPUT), output, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["pissa", "loftq", "lq_lora"])
def test_a_start_loses_less_than_quantizing_alone(name: str) -> None:
    """On the weights: ‖W − W'‖ of the started layer is below ‖W − q(W)‖, and with Fisher weights for LQ-LoRA."""
    dense, format = two(), tt.Affine(code_bits=2, group_size=8)
    W = dense.second.weight.detach()
    F = measured(STARTS["lq_lora"], dense)["second"] if name == "lq_lora" else torch.ones_like(W)
    layer: Any = encoded(name, format).second
    delta = layer.delta["default"]
    with torch.no_grad():
        started = delta.method.weight(layer.weight, delta)
        plain = format.decode(format.encode(W), tuple(W.shape))

    def lost(other: Tensor) -> float:
        return float(torch.linalg.vector_norm(F.sqrt() * (W - other)))

    assert lost(started) < 0.9 * lost(plain)


def test_the_untuned_model_stays_the_model() -> None:
    """Without its adapter a layer has its principal part back: the codes keep beside them what was taken out."""
    dense, model = two()(INPUT), encoded("pissa", tt.NF4())
    alone = tt.activate(model, None)(INPUT)
    assert (alone - dense).abs().max() < 0.2 * dense.abs().max()
    assert torch.equal(tt.detach(model)(INPUT), alone)


def test_slices_of_one_weight_share_its_code() -> None:
    host = next(host for host in laws.zoo() if host.name == "slice")
    torch.manual_seed(0)
    dense: Any = host.build()
    x = host.inputs(2)["x"]
    model = tt.attach(copy.deepcopy(dense), tt.LoRA(rank=3, start="pissa"), "q, v", quantize=tt.Absmax())
    assert model.layer.c_attn.code.tensors()["up"].shape == (72, 6)
    assert (model(x) - dense(x)).abs().max() < 0.02 * dense(x).abs().max()


def test_an_adapter_started_before_quantizing_does_not_load_after_it(tmp_path: Path) -> None:
    tt.save(encoded("loftq", tt.NF4()), tmp_path)
    whole = tt.quantize(two(), tt.NF4(), "*")
    with pytest.raises(tt.UserError, match="quantized as a whole") as error:
        tt.load(whole, tmp_path)
    assert "dense model" in str(error.value)


# ------------------------------------------------------------------------------------------------- what can be wrong


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: tt.LoRA(start="pisa"), "names no factor and no start"),
        (lambda: find("pissa", "start")(rounds=0), "rounds"),
        (lambda: find("lora_ga", "start")(directions="up"), "ArB2r"),
        (lambda: find("corda", "start")(part="middle"), "largest"),
        (lambda: find("eva", "start")(spread=0.5), "spread"),
        (lambda: tt.attach(two(), tt.LoRA(rank=25, start="pissa"), "*"), "a matrix of 40 x 24"),
        (lambda: tt.attach(two(), tt.LoRA(start="loftq"), "*"), "--quantize nf4"),
        (lambda: tt.attach(two(), tt.LoRA(start="eva"), "*"), "no covariance was measured"),
        (lambda: tt.attach(two(), tt.PiSSA(), "*"), "LoRA"),
        (
            lambda: tt.attach(tt.quantize(two(), tt.NF4(), "*"), tt.LoRA(start="loftq"), "*", quantize=tt.NF4()),
            "already",
        ),
    ],
)
def test_what_a_user_can_get_wrong(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(tt.UserError) as error:
        make()
    assert says in str(error.value)
