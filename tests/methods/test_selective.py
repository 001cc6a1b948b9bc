"""Selective methods: which entries are trained, that nothing else is paid for, and what changes during training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import trimtab as tt
from trimtab.core.deltas import edited_modules
from trimtab.core.fisher import MEASURES
from trimtab.core.gated import Gated
from trimtab.core.save import adapter_tensors, overwrite
from trimtab.core.settle import settle
from trimtab.laws.decoder import Decoder
from trimtab.laws.hosts import Alone
from trimtab.laws.judging import move
from trimtab.laws.numbers import Sizes


def batch(rows: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 29, (rows, 7), generator=torch.Generator().manual_seed(seed))}


def loss(model: Any, row: Any) -> torch.Tensor:
    logits = model(**row)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), row["input_ids"][:, 1:].flatten())


def decoder() -> Any:
    torch.manual_seed(0)
    return Decoder()


def deltas(model: nn.Module) -> dict[str, Any]:
    return {name: module.delta["default"] for name, module in edited_modules(model)}  # type: ignore[index]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [one for one in model.parameters() if one.requires_grad]


# ---------------------------------------------------------------------------------------------------------- BitFit


def bert() -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 31, "hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = transformers.BertConfig(**sizes, num_attention_heads=4, num_labels=3, max_position_embeddings=16)
    return transformers.BertForSequenceClassification(config).eval()


def test_bit_fit_trains_every_bias_of_bert_with_its_own_gradient() -> None:
    model, native = bert(), bert()
    tt.attach(model, tt.BitFit())
    h, layers = 24, 2
    of_the_paper = layers * (4 * h + h + 4 * h + h + h) + 2 * h  # with the pooler and the first norm
    assert sum(one.numel() for one in trained(model)) == of_the_paper + 3
    rows = {"input_ids": batch()["input_ids"], "labels": torch.tensor([0, 1, 2, 1, 0])}
    model(**rows).loss.backward()
    native(**rows).loss.backward()
    biases = {name.removesuffix(".bias"): one.grad for name, one in native.named_parameters() if name.endswith("bias")}
    found = {name: delta.d.grad for name, delta in deltas(model).items()}
    assert found.keys() == biases.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, biases[name], rtol=1e-5, atol=1e-7)


def test_the_smaller_set_of_bit_fit_is_queries_and_the_first_feed_forward_layer() -> None:
    model = tt.attach(bert(), tt.BitFit(), where="q, up")
    names = {name.split("layer.")[1][2:] for name in deltas(model)}
    assert names == {"attention.self.query", "intermediate.dense"}


def test_a_model_without_biases_is_refused_and_a_partly_biased_one_is_not() -> None:
    bare = nn.Sequential(nn.Linear(4, 4, bias=False), nn.RMSNorm(4))
    with pytest.raises(tt.UserError, match=r"none of the 2 places .* has a bias(.|\n)*OutputBias"):
        tt.attach(bare, tt.BitFit())
    mixed = tt.attach(nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 5)), tt.BitFit())
    assert list(deltas(mixed)) == ["1"]


# --------------------------------------------------------------------------------------------------------- presets


def test_top_layers_trains_everything_in_the_last_layers_and_computes_nothing_below() -> None:
    model = tt.attach(decoder(), tt.TopLayers(1))
    names = set(deltas(model))
    assert names == {place.name for place in tt.select(model, "all") if place.layer == 1 and place.kind != "opaque"}
    assert any("norm" in name for name in names)
    seen: list[torch.Tensor] = []
    model.model.layers[0].register_forward_hook(lambda m, args, y: seen.append(y[0] if isinstance(y, tuple) else y))
    loss(model, batch()).backward()
    assert not seen[0].requires_grad
    assert all(one.grad is not None for one in trained(model))
    with pytest.raises(tt.UserError, match="layers=0"):
        tt.TopLayers(0)


def test_a_range_from_the_end_counts_each_stack_on_its_own() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 31, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 4}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, num_layers=2, num_decoder_layers=3))
    tt.attach(model, tt.TopLayers(2))
    blocks = {".".join(name.split(".")[:3]) for name in deltas(model)}
    assert blocks == {"encoder.block.0", "encoder.block.1", "decoder.block.1", "decoder.block.2"}


@pytest.mark.parametrize(("preset", "path"), [(tt.HeadOnly, "lm_head"), (tt.Embedding, "model.embed_tokens")])
def test_head_and_embedding_presets_train_just_that(preset: Any, path: str) -> None:
    model = tt.attach(decoder(), preset())
    assert list(deltas(model)) == [path]


# -------------------------------------------------------------------------------------------------- embedding rows


@pytest.mark.parametrize(
    ("tokens", "ids"),
    [("3", [3]), ("-2:", [27, 28]), ("5, 1, 5", [1, 5]), ("2:4, 0", [0, 2, 3]), ("-1", [28])],
)
def test_tokens_are_read_as_python_reads_them(tokens: str, ids: list[int]) -> None:
    assert tt.EmbeddingRows(tokens).ids(29) == ids


@pytest.mark.parametrize("tokens", ["", "a", "1:2:3", "1-5", ","])
def test_unreadable_tokens_are_explained(tokens: str) -> None:
    with pytest.raises(tt.UserError, match="cannot be read"):
        tt.EmbeddingRows(tokens)


@pytest.mark.parametrize(("tokens", "message"), [("29, 3", "no token 29"), ("-30", "no token -1"), ("40:", "no token")])
def test_tokens_outside_the_vocabulary_are_named(tokens: str, message: str) -> None:
    with pytest.raises(tt.UserError, match=message):
        tt.attach(decoder(), tt.EmbeddingRows(tokens))


def test_only_the_given_rows_change_and_are_stored(tmp_path: Path) -> None:
    model = decoder()
    before = model.model.embed_tokens.weight.detach().clone()
    tt.attach(model, tt.EmbeddingRows("3, 7:9"))
    optimizer = torch.optim.AdamW(trained(model), lr=0.1)
    loss(model, {"input_ids": torch.tensor([[3, 7, 8, 1, 2, 3]])}).backward()
    optimizer.step()
    V = deltas(model)["model.embed_tokens"].V.detach().clone()
    stored = adapter_tensors(model, "default")
    assert sum(one.numel() for one in stored.values() if one.is_floating_point()) == 3 * before.shape[1]
    tt.save(model, tmp_path)
    tt.merge(model)
    after = model.model.embed_tokens.weight
    assert torch.equal((after != before).any(1).nonzero().flatten(), torch.tensor([3, 7, 8]))
    assert torch.equal(after[[3, 7, 8]], V)
    other = decoder()
    with torch.no_grad():
        other.model.embed_tokens.weight[[3, 7, 8]] = torch.randn(3, before.shape[1])  # as after resizing anew
        tt.merge(tt.load(other, tmp_path))
    assert torch.equal(other.model.embed_tokens.weight, after)


def test_peft_trains_the_same_tokens_to_the_same_effect() -> None:
    peft = pytest.importorskip("peft")

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.embed, self.out = nn.Embedding(29, 12), nn.Linear(12, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.embed(x))

    ours = move(tt.attach(Tiny(), tt.EmbeddingRows("2, 11:14"), where="embed"))
    theirs = peft.get_peft_model(
        Tiny(), peft.TrainableTokensConfig(token_indices=[2, 11, 12, 13], target_modules=["embed"])
    )
    mine = ours.embed.delta["default"].V
    (other,) = [one for one in theirs.parameters() if one.requires_grad]
    with torch.no_grad():
        other.copy_(mine)
    x = batch(6)["input_ids"]
    for model in (ours, theirs):
        model(x).square().sum().backward()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------- masks


def test_pafi_takes_the_smallest_of_all_sites_but_no_zeros() -> None:
    model = decoder()
    tt.prune(model, 0.2)
    weights = {place.name: model.get_submodule(place.module).weight for place in tt.select(model, "all-linear")}
    flat = np.concatenate([W.detach().abs().numpy().reshape(-1) for W in weights.values()])
    bar = np.sort(flat[flat > 0])[int(0.05 * flat.size) - 1]
    tt.attach(model, tt.PaFi(0.05))
    for name, delta in deltas(model).items():
        W = weights[name].detach().abs().numpy().reshape(-1)
        chosen = np.logical_and(W > 0, np.less_equal(W, bar))
        assert set(delta.index.tolist()) == set(np.flatnonzero(chosen).tolist())
    tt.merge(move(model))
    assert all((W == 0).sum() == int(0.2 * W.numel()) for W in weights.values()), "a pruned entry came back"


def test_pafi_takes_what_there_is_where_nearly_everything_is_zero() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    tt.prune(model, 0.9, "0")
    tt.attach(model, tt.PaFi(0.5), "0")
    assert torch.equal(deltas(model)["0"].index, model[0].weight.flatten().nonzero().flatten())


def test_a_gradient_mask_takes_equally_many_inputs_of_every_output() -> None:
    model = decoder()
    measured = tt.gradient(model, [batch()], loss=loss)
    tt.attach(model, tt.GradientMask(0.1), statistics=measured)
    for name, delta in deltas(model).items():
        G = measured[name].abs().numpy()
        keep = max(1, int(0.1 * G.shape[1]))
        wanted = [row * G.shape[1] + col for row in range(len(G)) for col in sorted(np.argsort(-G[row])[:keep])]
        assert delta.index.tolist() == wanted


def test_a_random_mask_depends_on_the_seed() -> None:
    masks = [deltas(tt.attach(decoder(), tt.RandomMask(0.1), seed=seed)) for seed in (0, 0, 1)]
    for name, delta in masks[0].items():
        assert delta.index.unique().numel() == delta.index.numel() == max(1, int(0.1 * np.prod(delta_shape(name))))
        assert torch.equal(delta.index, masks[1][name].index)
        assert not torch.equal(delta.index, masks[2][name].index)


def delta_shape(name: str) -> tuple[int, ...]:
    return tuple(decoder().get_submodule(name).weight.shape)


@pytest.mark.parametrize("name", ["FishMask", "FishDIP", "PaFi", "RandomMask", "GradientMask", "SHiRA"])
def test_no_dense_gradient_or_mask_is_made(name: str) -> None:
    model: Any = Alone(nn.Linear(64, 48))
    method = tt.SHiRA(rank=1) if name == "SHiRA" else getattr(tt, name)(density=0.01)
    x = torch.randn(3, 64)
    measured = None
    if method.statistics:
        measure = MEASURES[method.statistics]
        measured = measure(model, [{"x": x}], "layer", loss=lambda m, row: m(row["x"]).square().mean())
    tt.attach(model, method, "layer", statistics=measured)
    made: list[torch.Tensor] = []
    with Sizes(lambda function, value: made.append(value) if value.numel() >= 64 * 48 else None):
        model(x).square().mean().backward()
    assert not made
    assert model.layer.weight.grad is None


@pytest.mark.parametrize("method", ["FishMask", "PaFi", "RandomMask", "GradientMask", "FishDIP", "DiffPruning"])
def test_a_density_that_is_no_share_is_refused(method: str) -> None:
    for density in (0, 1.5):
        with pytest.raises(tt.UserError, match=f"density={density}"):
            getattr(tt, method)(density=density)


# -------------------------------------------------------------------------------------------------------- FISH-DIP


def test_the_hardest_rows_are_those_of_the_highest_loss() -> None:
    model, rows = decoder(), batch(40)
    losses = [float(loss(model, {"input_ids": rows["input_ids"][n : n + 1]}).detach()) for n in range(40)]
    hardest = sorted(range(40), key=lambda n: -losses[n])[:4]
    found = tt.hardest_fisher(model, [rows], loss=loss)
    wanted = tt.fisher(model, [{"input_ids": rows["input_ids"][hardest]}], loss=loss)
    assert found.keys() == wanted.keys()
    for name, F in found.items():
        torch.testing.assert_close(F, wanted[name])
    few = batch(2)
    torch.testing.assert_close(tt.hardest_fisher(model, [few], loss=loss), tt.fisher(model, [few], loss=loss))


def measure_on(model: nn.Module, seed: int) -> Any:
    return lambda part: tt.hardest_fisher(model, [batch(20, seed)], part.where, loss=loss)


def dense(delta: Any, name: str) -> np.ndarray:
    moved = np.zeros(int(np.prod(delta_shape(name))))
    for index, value in ((delta.index, delta.value), (delta.kept_index, delta.kept_value)):
        moved[index.numpy()] = value.detach().numpy()
    return moved


def test_a_new_mask_is_where_the_fisher_information_is_now_and_changes_no_output() -> None:
    model = decoder()
    method = tt.FishDIP(density=0.02, every=3)
    tt.attach(model, method, statistics=tt.hardest_fisher(model, [batch(20)], loss=loss))
    budget = sum(delta.index.numel() for delta in deltas(model).values())
    trace: list[dict[str, np.ndarray]] = []
    for round_ in (1, 2, 3):
        optimizer = torch.optim.AdamW(trained(model), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            loss(model, batch(5, round_)).backward()
            optimizer.step()
        before = {name: dense(delta, name) for name, delta in deltas(model).items()}
        with torch.no_grad():
            output = model(**batch())
        measured = measure_on(model, round_)
        F = tt.hardest_fisher(model, [batch(20, round_)], loss=loss)
        parameters = {name: delta.value for name, delta in deltas(model).items()}
        assert settle(model, 3 * round_ - 1, measured) == []
        assert settle(model, 3 * round_, measured) == ["fish_dip"]
        assert {name: delta.value for name, delta in deltas(model).items()} == parameters, "the optimizer lost them"
        with torch.no_grad():
            torch.testing.assert_close(model(**batch()), output)
        assert sum(delta.index.numel() for delta in deltas(model).values()) == budget
        firsts = [one.flatten().sort(descending=True).values for one in F.values()]
        rest = torch.cat([one[1:] for one in firsts]).sort(descending=True).values
        bar = rest[budget - len(F) - 1]
        for name, delta in deltas(model).items():
            chosen = set((F[name].flatten() >= bar).nonzero().flatten().tolist()) | {int(F[name].argmax())}
            assert set(delta.index.tolist()) == chosen
            assert not set(delta.index.tolist()) & set(delta.kept_index.tolist())
            np.testing.assert_array_equal(dense(delta, name), before[name])
            assert method.stale(delta, 3 * round_) == [delta.value]
        trace.append(before)
    assert any(delta.kept_index.numel() for delta in deltas(model).values()), "no entry ever left the mask"


def test_settling_says_what_it_needs() -> None:
    model = decoder()
    tt.attach(model, tt.FishDIP(every=1), statistics=tt.hardest_fisher(model, [batch()], loss=loss))
    with pytest.raises(tt.UserError, match=r"trimtab\.hardest_fisher"):
        settle(model, 1)


def test_a_loss_that_outlives_a_change_of_shape_is_told() -> None:
    model = tt.attach(decoder(), tt.DiffPruning(gates_until=1))
    kept = loss(model, batch())
    kept.backward()
    with pytest.raises(tt.UserError, match="del loss"):
        settle(model, 1)


# ---------------------------------------------------------------------------------------------------- diff pruning


GATED = [tt.DiffPruning, tt.StructuredDiffPruning]


def train_a_little(model: Any, steps: int, rate: float = 0.02) -> None:
    optimizer = torch.optim.AdamW(trained(model), lr=rate)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        penalty = sum(delta.method.penalty(delta) or 0 for delta in deltas(model).values())
        (loss(model, batch(5, step)) + penalty).backward()
        optimizer.step()
        settle(model, step)
        for delta in deltas(model).values():
            delta.method.on_step(delta, step)
            for tensor in delta.method.stale(delta, step):
                optimizer.state.pop(tensor, None)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-np.asarray(x, dtype=np.float64)))


@pytest.mark.parametrize("cls", GATED)
def test_the_penalty_is_the_expected_number_of_open_gates(cls: Any) -> None:
    model = move(tt.attach(decoder().double(), cls(sparsity=0.01, gate_speed=7), "up@0"))
    (delta,) = deltas(model).values()
    log_alpha = 5 + 7 * delta.gate.detach().numpy()
    wanted = sigmoid(log_alpha).sum()
    group = sigmoid(5 + 7 * delta.group_gate.item()) if cls is tt.StructuredDiffPruning else 0.0
    assert delta.method.penalty(delta).item() == pytest.approx(0.01 * (wanted + group))


def test_the_papers_penalty_of_structured_diff_pruning_is_a_product_and_its_codes_a_sum() -> None:
    """The facts' 14.1: at the published sparsity only the sum leaves the matrix's gate to the task."""
    pulls = {}
    for summed in (True, False):
        method = tt.StructuredDiffPruning(sparsity=0.01, gate_speed=7, summed=summed)
        (delta,) = deltas(move(tt.attach(decoder().double(), method, "up@0"))).values()
        each = sigmoid(5 + 7 * delta.gate.detach().numpy()).sum()
        group = sigmoid(5 + 7 * delta.group_gate.item())
        penalty = delta.method.penalty(delta)
        assert penalty.item() == pytest.approx(0.01 * (each + group if summed else each * group))
        (pulls[summed],) = torch.autograd.grad(penalty, delta.group_gate)
    assert pulls[False].item() == pytest.approx(each * pulls[True].item())


def test_the_gate_of_a_matrix_stays_open_at_the_published_sparsity() -> None:
    def after(summed: bool) -> float:
        model = tt.attach(decoder(), tt.StructuredDiffPruning(summed=summed, gates_until=1000), "up@0")
        optimizer = torch.optim.AdamW(trained(model), lr=1.3e-4, weight_decay=0.0)
        (delta,) = deltas(model).values()
        for _ in range(60):
            optimizer.zero_grad()
            delta.method.penalty(delta).backward()
            optimizer.step()
        return delta.method.log_alpha(delta.group_gate).item()

    assert after(summed=True) > 2.0 > 0.0 > after(summed=False)


def test_gates_are_open_as_often_as_the_penalty_says() -> None:
    """P(z > 0) = σ(log α), and z is drawn with temperature 1."""
    torch.manual_seed(0)
    model = tt.attach(nn.Sequential(nn.Linear(200, 200)), tt.DiffPruning(gate_speed=1), "0")
    (delta,) = deltas(model).values()
    with torch.no_grad():
        delta.gate.fill_(-5 + 0.4)
    z = delta.method.gates(delta)
    assert (z > 0).double().mean().item() == pytest.approx(sigmoid(0.4), abs=0.01)
    inner = z[(z > 0) & (z < 1)].double()
    s = (inner + 1.5) / 3
    back = (torch.log(s) - torch.log1p(-s) - 0.4).detach()  # the logistic noise it came from
    u = torch.sigmoid(back).sort().values
    low, high = sigmoid(0 - 0.4), sigmoid(np.log(5) - 0.4)
    even = low + (high - low) * (torch.arange(len(u)) + 0.5) / len(u)
    assert (u - even).abs().max() < 0.02, "the noise is not uniform"


@pytest.mark.parametrize("cls", GATED)
def test_noise_follows_from_the_site_and_the_step(cls: Any) -> None:
    models = [tt.attach(decoder(), cls()) for _ in range(2)]
    for steps, model in zip(([1, 2, 3], [3]), models, strict=True):
        for step in steps:
            for delta in deltas(model).values():
                delta.method.on_step(delta, step)
    for name, delta in deltas(models[0]).items():
        assert torch.equal(delta.noise, deltas(models[1])[name].noise)
    one, two = list(deltas(models[0]).values())[:2]
    assert not torch.equal(one.noise.flatten()[:50], two.noise.flatten()[:50])


@pytest.mark.parametrize("cls", GATED)
def test_projection_keeps_the_largest_of_all_sites_and_then_trains_them_only(cls: Any, tmp_path: Path) -> None:
    model = decoder()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    tt.attach(model, cls(density=0.03, gates_until=4, gate_speed=20))
    train_a_little(model, 3)
    kept: dict[str, tuple[Any, Any]] = {}
    sizes = sum(delta.value.numel() for delta in deltas(model).values())
    original = Gated.settle

    def watched(self: Any, sites: Any, statistics: Any, step: Any) -> None:
        for name, p in sites.items():
            kept[name] = ((self.gates(p) * p.value).detach().numpy().reshape(-1), p.value.detach().clone().flatten())
        original(self, sites, statistics, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gated, "settle", watched)
        settle(model, 4)
    flat = np.sort(np.abs(np.concatenate([offset for offset, _ in kept.values()])))[::-1]
    bar = flat[int(0.03 * sizes) - 1]
    assert sum(delta.index.numel() for delta in deltas(model).values()) == int(0.03 * sizes)
    for name, delta in deltas(model).items():
        offset, w = kept[name]
        assert set(delta.index.tolist()) == set(np.flatnonzero(np.abs(offset) >= bar).tolist())
        assert torch.equal(delta.value, w[delta.index]), "the fixed mask starts at w"
        assert delta.method.penalty(delta) is None
    train_a_little(model, 2)
    tt.save(model, tmp_path)
    assert (tmp_path / "adapter.safetensors").stat().st_size < 40 * int(0.03 * sizes) + 20000
    with torch.no_grad():
        output = model(**batch())
        torch.testing.assert_close(tt.load(decoder(), tmp_path)(**batch()), output)
    where = {name: delta.index for name, delta in deltas(model).items()}
    tt.merge(model)
    for name, value in model.state_dict().items():
        changed = (value != base[name]).flatten().nonzero().flatten()
        assert set(changed.tolist()) <= set(where.get(name.removesuffix(".weight"), torch.tensor([])).tolist())


@pytest.mark.parametrize("cls", GATED)
def test_a_training_that_ends_early_keeps_what_was_computed(cls: Any) -> None:
    model = tt.attach(decoder(), cls(density=1.0, gates_until=1000, gate_speed=100))
    train_a_little(model, 5)
    with torch.no_grad():
        output = model(**batch())
        assert settle(model, None)
        torch.testing.assert_close(model(**batch()), output)
        assert not any(delta.value.ndim == 2 for delta in deltas(model).values())
        settle(model, None)
        torch.testing.assert_close(model(**batch()), output)


@pytest.mark.parametrize("cls", GATED)
def test_gates_close_under_the_penalty(cls: Any) -> None:
    model = tt.attach(decoder(), cls(sparsity=1.0, gate_speed=2000), "up")
    before = sum(float(delta.method.opened(delta).detach()) for delta in deltas(model).values())
    train_a_little(model, 30, rate=5e-4)
    after = sum(float(delta.method.opened(delta).detach()) for delta in deltas(model).values())
    assert after < 0.2 * before


def test_an_adapter_of_another_phase_can_be_put_back() -> None:
    model = tt.attach(decoder(), tt.DiffPruning(density=0.05, gates_until=2))
    train_a_little(model, 1)
    early = {key: value.clone() for key, value in adapter_tensors(model, "default").items()}
    settle(model, 2)
    late = {key: value.clone() for key, value in adapter_tensors(model, "default").items()}
    overwrite(model, "default", early)
    assert all(torch.equal(value, early[key]) for key, value in adapter_tensors(model, "default").items())
    overwrite(model, "default", late)
    assert all(torch.equal(value, late[key]) for key, value in adapter_tensors(model, "default").items())


@pytest.mark.parametrize("settings", [{"sparsity": -1.0}, {"gates_until": 0}, {"gate_speed": 0}])
def test_wrong_settings_of_gates_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(tt.UserError, match=next(iter(settings))):
        tt.DiffPruning(**settings)
