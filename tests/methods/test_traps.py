"""Where paper, official code and libraries disagree: what is done here, by its number in `docs/differences.md`.

17 (LongLoRA's leak) is in `tests/engine/test_shifted_attention.py`, 18 (layouts of convolutions) in
`tests/interop/test_peft.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab import laws

METHODS = tt.methods()
DECODER = next(host for host in laws.zoo() if host.name == "decoder")


def on_linear(method: Any, out: int = 24, into: int = 32, bias: bool = False) -> tuple[Any, Any]:
    """A linear layer with a method on it, and its delta."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(into, out, bias=bias))
    tt.attach(model, method, "*")
    return model, model[0].delta["default"]


def change(model: Any, delta: Any) -> Tensor:
    """W' − W."""
    with torch.no_grad():
        changed: Tensor = delta.method.weight(model[0].weight, delta) - model[0].weight
        return changed


def test_1_a_random_prompt_is_drawn_on_both_sides_of_zero() -> None:
    """The released code draws from [0, 0.5); the paper says ±0.5."""
    model = DECODER.build()
    tt.attach(model, tt.PromptTuning(start="random", length=20))
    (P,) = (one for one in model.parameters() if one.requires_grad)
    assert -0.5 <= float(P.min()) < -0.4
    assert 0.4 < float(P.max()) <= 0.5


def test_2_houlsby_starts_with_the_papers_deviation() -> None:
    """The paper's text says 1e-2, its code 1e-3 cut at two deviations, AdapterHub N(0, 0.02²)."""
    _, delta = on_linear(METHODS["houlsby"](bottleneck=64), out=512, into=512)
    assert float(delta.D.abs().max()) <= 2e-2
    assert float(delta.D.std()) == pytest.approx(0.88e-2, rel=0.02)


def test_3_compacter_goes_after_attention_and_feed_forward() -> None:
    """The repository's `pfeiffer` setting puts it after attention only; its counts include layer norms, ours do not."""
    model = DECODER.build()
    tt.attach(model, METHODS["compacter"](bottleneck=4))
    sites = {name.rpartition(".")[2] for name, module in model.named_modules() if "delta" in module._modules}
    assert len(sites) == 2
    assert not any("norm" in name for name, one in model.named_parameters() if one.requires_grad)


def test_4_vera_trains_vectors_and_shares_its_matrices() -> None:
    """AdapterHub makes matrices for every layer."""
    model = DECODER.build()
    tt.attach(model, METHODS["vera"](rank=4), "q, v")
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    assert all(one.ndim == 1 for one in trained.values())
    held = [one for name, one in model.named_buffers() if one.ndim == 2 and "delta" in name.lower()]
    assert not [one for one in held if 4 in one.shape]


def test_5_lora_ga_scales_both_factors_alike() -> None:
    """PEFT multiplies B by singular values and leaves A unscaled."""
    model = nn.Sequential(nn.Linear(32, 24, bias=False))
    G = torch.randn(24, 32, generator=torch.Generator().manual_seed(1))
    tt.attach(model, tt.LoRA(rank=4, alpha=4.0, start="lora_ga"), "*", statistics={"0": G})
    delta: Any = model[0].delta["default"]  # type: ignore[union-attr, index]
    kappa = 24**0.25 / 4
    torch.testing.assert_close(delta.A.norm(dim=1), torch.full((4,), kappa))
    torch.testing.assert_close(delta.B.norm(dim=0), torch.full((4,), kappa))


def test_5_qa_lora_pools_the_mean_and_merges_into_zero_points() -> None:
    """PEFT's pooled input is larger by the number of groups, and what it trains cannot be merged into codes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24))
    tt.quantize(model, tt.Affine(4, 8), "*")
    tt.attach(model, METHODS["qa_lora"](rank=4, alpha=4.0, group_size=8), "*")
    delta: Any = model[0].delta["default"]  # type: ignore[union-attr, index]
    delta.B.data.normal_()
    x = torch.randn(3, 32)
    with torch.no_grad():
        before = model(x)
        frozen = tt.activate(model, None)(x)
        pooled = x.view(3, 4, 8).mean(2)
        torch.testing.assert_close(before, frozen + pooled @ delta.A.T @ delta.B.T)
        merged = tt.merge(tt.activate(model, "default"))
        torch.testing.assert_close(merged(x), before, rtol=1e-4, atol=1e-4)
        assert "code" in merged[0]._modules  # type: ignore[index]


def test_6_the_whole_of_loftqs_correction_acts() -> None:
    """The official code leaves alpha / rank out: with its 16 / 64 a quarter acts at the start."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48, bias=False))
    W = model[0].weight.detach().clone()
    ways = {}
    for alpha in (4.0, 64.0):
        one = nn.Sequential(nn.Linear(64, 48, bias=False))
        one[0].weight.data.copy_(W)
        tt.attach(one, tt.LoRA(rank=16, alpha=alpha, start="loftq"), "*", quantize=tt.NF4())
        ways[alpha] = one(torch.eye(64)).T.detach()
    torch.testing.assert_close(ways[4.0], ways[64.0], rtol=1e-4, atol=1e-5)
    plain = tt.NF4().decode(tt.NF4().encode(W), (48, 64))
    assert float((ways[4.0] - W).norm()) < 0.8 * float((plain - W).norm())


def test_7_svft_starts_at_the_weight_and_ranks_the_papers_product() -> None:
    """The official code draws its entries behind a gate, so starts elsewhere, and ranks U V where the paper has UᵀV."""
    model, delta = on_linear(METHODS["svft"](pattern="top", width=1), out=16, into=16)
    assert float(change(model, delta).abs().max()) == 0
    size = len(delta.index)
    assert set(delta.index.tolist()) == set((delta.U.T @ delta.V).flatten().topk(size).indices.tolist())
    assert set(delta.index.tolist()) != set((delta.U @ delta.V).flatten().topk(size).indices.tolist())


def test_8_full_factors_of_lokr_have_no_scale() -> None:
    """PEFT keeps alpha / rank there."""
    for alpha in (8.0, 80.0):
        model, delta = on_linear(METHODS["lokr"](rank=16, alpha=alpha))
        delta.D.data.fill_(1.0)
        torch.testing.assert_close(change(model, delta), torch.kron(delta.C, delta.D).detach())


def test_9_oft_is_the_exact_cayley_map() -> None:
    """PEFT's exact branch gives the transpose of its Neumann branch."""
    model, delta = on_linear(METHODS["oft"](block_size=4), out=3, into=4)
    delta.q.data.normal_(std=0.5)
    Q = torch.zeros(4, 4)
    Q[tuple(torch.triu_indices(4, 4, 1))] = delta.q.detach()[0]
    Q = Q - Q.T
    R = (torch.eye(4) + Q) @ torch.linalg.inv(torch.eye(4) - Q)
    torch.testing.assert_close(delta.method.weight(model[0].weight, delta).detach(), (model[0].weight @ R.T).detach())


def test_10_boft_has_the_factors_that_it_is_asked_for() -> None:
    """PEFT takes one where its CUDA extension is missing."""
    _, delta = on_linear(METHODS["boft"](block_size=4, factors=3))
    assert delta.D.shape[0] == 3


def test_11_hra_learns_from_its_start() -> None:
    """Pairs of equal columns cancel, and a gradient step takes them apart."""
    model, delta = on_linear(METHODS["hra"](rank=4))
    torch.testing.assert_close(change(model, delta), torch.zeros(24, 32), rtol=0, atol=1e-6)
    model(torch.randn(5, 32)).square().sum().backward()
    assert float(delta.U.grad[:, 0].norm()) > 1e-3
    assert not torch.allclose(delta.U.grad[:, 0], delta.U.grad[:, 1])


def test_12_every_base_of_randlora_meets_its_own_coefficients() -> None:
    """PEFT numbers the columns of B base by base and the rows of A row by row."""
    model, delta = on_linear(METHODS["randlora"](rank=4, alpha=8.0), out=24, into=16)
    delta.lambda_.data.normal_()
    A, B = delta.shared.A[:, :16], delta.shared.B[:, :24]
    terms = [B[j] @ delta.lambda_[j].diag() @ A @ delta.gamma[j].diag() for j in range(4)]
    torch.testing.assert_close(change(model, delta), 2 * sum(terms).detach())  # type: ignore[union-attr]


def test_13_llama_adapter_has_a_gate_per_head_under_a_tanh() -> None:
    """PEFT has one gate a layer and no tanh."""
    model = DECODER.build()
    tt.attach(model, METHODS["llama_adapter"](length=3))
    deltas = [one for name, one in model.named_parameters() if name.endswith(".g")]
    assert {one.shape for one in deltas} == {(4,)}
    inputs = DECODER.inputs(2)
    for one in deltas:
        one.data.fill_(20.0)
    saturated = model(**inputs)
    for one in deltas:
        one.data.fill_(40.0)
    torch.testing.assert_close(model(**inputs), saturated)


def test_14_a_prefix_goes_on_with_its_network_unless_it_is_baked(tmp_path: Any) -> None:
    """PEFT keeps the final embeddings only."""
    model = DECODER.build()
    tt.attach(model, tt.PrefixTuning(length=3, hidden=8))
    tt.save(model, tmp_path / "whole")
    tt.save(model, tmp_path / "baked", bake=True)
    resumed, small = DECODER.build(), DECODER.build()
    assert tt.load(resumed, tmp_path / "whole")
    assert tt.load(small, tmp_path / "baked")
    names = {
        kind: {name.rpartition(".")[2] for name, one in made.named_parameters() if one.requires_grad}
        for kind, made in (("whole", resumed), ("baked", small))
    }
    assert names == {"whole": {"E", "V", "c", "O", "o"}, "baked": {"P"}}


def test_15_ia3_leaves_the_query_of_a_fused_projection_alone() -> None:
    """PEFT scales all of GPT-2's c_attn."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 31, "n_embd": 24, "n_layer": 1, "n_head": 4, "n_positions": 40}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    x = torch.randn(1, 5, 24)
    before = model.transformer.h[0].attn.c_attn(x)
    tt.attach(model, tt.IA3())
    for name, one in model.named_parameters():
        if one.requires_grad:
            assert name.endswith((".l", ".l_in"))
            one.data.fill_(2.0)
    after = model.transformer.h[0].attn.c_attn(x)
    torch.testing.assert_close(after[..., :24], before[..., :24])
    torch.testing.assert_close(after[..., 24:], 2 * before[..., 24:])


def test_16_direft_is_the_papers_and_drops_nothing_of_the_residual() -> None:
    """pyreft's class of that name keeps rows orthonormal, and its dropout falls on h as well."""
    method = METHODS["direft"](rank=2)
    assert not hasattr(method, "dropout")
    h = torch.randn(5, 8)
    p = type("p", (), {"W1": torch.randn(2, 8), "b": torch.randn(2), "W2": torch.randn(2, 8)})
    torch.testing.assert_close(method.edit(h, p), (h @ p.W1.T + p.b) @ p.W2)


def test_19_lora_on_gpt2_medium_has_393_thousand_values() -> None:
    """The paper's table says 0.35 M for the row of its GPT-2; its formula gives 0.39 M."""
    _, delta = on_linear(tt.LoRA(rank=4), out=1024, into=1024)
    assert 24 * 2 * sum(one.numel() for one in delta.parameters() if one.requires_grad) == 393_216


def test_20_miss_has_as_many_values_as_its_one_matrix() -> None:
    """Its README counts it as LoRA, rank·(in + out)."""
    _, delta = on_linear(METHODS["miss"](rank=8))
    assert sum(one.numel() for one in delta.parameters()) == 8 * 24


def test_21_the_low_rank_branch_acts_on_the_input_itself() -> None:
    """SVDQuant's calibration branch acts on x / λ, its exported one on x: here it is x, smoothed or not."""
    torch.manual_seed(0)
    W = torch.randn(24, 32)
    form = tt.SVDQuant(rank=4)
    code = form.encode(W)
    rest = form.inner.decode({key: value for key, value in code.items() if key not in ("up", "down")}, (24, 32))
    x = torch.randn(3, 32)
    branch = (x @ code["down"].float().T) @ code["up"].float().T
    torch.testing.assert_close(x @ form.decode(code, (24, 32)).T, x @ rest.T + branch, rtol=1e-4, atol=1e-4)

    form = tt.SVDQuant(rank=4, smooth=True)
    code = form.encode_for(W, torch.diag(torch.rand(32) + 0.1))
    rest = form.inner.decode({key: code[key] for key in code if key not in ("up", "down", "smooth")}, (24, 32))
    branch = (x @ code["down"].float().T) @ code["up"].float().T
    wanted = (x / code["smooth"].float()) @ rest.T + branch
    torch.testing.assert_close(x @ form.decode(code, (24, 32)).T, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8])
def test_22_no_token_is_edited_twice_and_none_of_an_odd_prompt_is_left_out(length: int) -> None:
    """pyreft floors both halves, so the middle of an odd prompt is never edited; AdapterHub lets the ends overlap."""
    from trimtab.core.positions import prompt_ends

    found = prompt_ends(torch.zeros(1, length, 2), None, 7, 7)
    assert found is not None
    assert found.flatten().tolist() == [1.0] * length
