"""The low-rank family against PEFT: the same tensors give the same outputs and gradients where the equations agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt

peft = pytest.importorskip("peft")

RTOL = 1e-5


class Tiny(nn.Module):
    """One or two layers, so that sites of two shapes share what is shared."""

    def __init__(self, *sizes: tuple[int, int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(into, out) for into, out in sizes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


TALL, WIDE = (24, 40), (40, 24)


def ours(method: Any, *sizes: tuple[int, int]) -> tuple[Any, list[Any]]:
    """A tiny model with a method whose tensors are off their start, and its deltas."""
    torch.manual_seed(3)
    model = Tiny(*sizes)
    tt.attach(model, method, "*")
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model, [layer.delta["default"] for layer in model.layers]


def theirs(config: Any, *sizes: tuple[int, int]) -> tuple[Any, list[Any]]:
    """The same model under PEFT, and its layers."""
    torch.manual_seed(3)
    model = peft.get_peft_model(Tiny(*sizes), config)
    return model, list(model.base_model.model.layers)


def agree(found: Tensor, wanted: Tensor, what: str) -> None:
    assert found.shape == wanted.shape, what
    assert (found - wanted).abs().max() <= RTOL * wanted.abs().max().clamp(min=1e-6), what


def compare(mine: Any, other: Any, pairs: list[tuple[Tensor, Any, Any]]) -> None:
    """Copy ours to theirs by each view, then compare outputs and gradients."""
    with torch.no_grad():
        for one, there, view in pairs:
            there.copy_(view(one))
    x = torch.randn(3, 5, mine.layers[0].in_features, generator=torch.Generator().manual_seed(5))
    y, z = mine(x), other(x)
    agree(y, z, "outputs")
    uneven = torch.linspace(0.5, 1.5, y.shape[-1])  # a loss that a rotation of the outputs changes
    (uneven * y).square().mean().backward()
    (uneven * z).square().mean().backward()
    for one, there, view in pairs:
        if one.requires_grad:
            agree(view(one.grad), there.grad, f"gradient of {tuple(there.shape)}")


def same(one: Tensor) -> Tensor:
    return one


TARGETS = ["0", "1"]


def test_lora_with_patterns_and_the_root_of_the_rank() -> None:
    method = tt.LoRA(rank=4, alpha=12.0, rank_power=0.5, ranks="1=2", alphas="0=6")
    model, deltas = ours(method, TALL, WIDE)
    settings = {"rank_pattern": {"1": 2}, "alpha_pattern": {"0": 6}, "use_rslora": True}
    other, layers = theirs(peft.LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS, **settings), TALL, WIDE)
    pairs: list[Any] = []
    for delta, layer in zip(deltas, layers, strict=True):
        pairs += [(delta.A, layer.lora_A["default"].weight, same), (delta.B, layer.lora_B["default"].weight, same)]
    compare(model, other, pairs)


def test_vera() -> None:
    model, deltas = ours(tt.methods()["vera"](rank=6), TALL, WIDE)
    other, layers = theirs(peft.VeraConfig(r=6, target_modules=TARGETS), TALL, WIDE)
    shared = deltas[0].shared
    pairs: list[Any] = [(shared.A, layers[0].vera_A["default"], same), (shared.B, layers[0].vera_B["default"], same)]
    for delta, layer in zip(deltas, layers, strict=True):
        pairs += [(delta.b, layer.vera_lambda_b["default"], same), (delta.d, layer.vera_lambda_d["default"], same)]
    compare(model, other, pairs)


def test_adalora() -> None:
    model, deltas = ours(tt.methods()["adalora"](rank=6, target=3, alpha=12.0), TALL, WIDE)
    config = peft.AdaLoraConfig(init_r=6, target_r=3, lora_alpha=12, target_modules=TARGETS, total_step=10)
    other, layers = theirs(config, TALL, WIDE)
    pairs: list[Any] = []
    for delta, layer in zip(deltas, layers, strict=True):
        pairs += [(delta.Q, layer.lora_A["default"], same), (delta.P, layer.lora_B["default"], same)]
        pairs += [(delta.lambda_, layer.lora_E["default"], lambda one: one[:, None])]
    compare(model, other, pairs)


def test_loha() -> None:
    model, deltas = ours(tt.methods()["loha"](rank=3, alpha=6.0), TALL, WIDE)
    other, layers = theirs(peft.LoHaConfig(r=3, alpha=6, target_modules=TARGETS), TALL, WIDE)
    pairs: list[Any] = []
    for delta, layer in zip(deltas, layers, strict=True):
        for n in (1, 2):
            pairs += [(getattr(delta, f"B{n}"), getattr(layer, f"hada_w{n}_a")["default"], same)]
            pairs += [(getattr(delta, f"A{n}"), getattr(layer, f"hada_w{n}_b")["default"], same)]
    compare(model, other, pairs)


def test_lokr() -> None:
    """With the larger factor of low rank; where both are full PEFT keeps a scale that the authors' code drops."""
    model, deltas = ours(tt.methods()["lokr"](rank=2, alpha=6.0, factor=4), TALL, WIDE)
    config = peft.LoKrConfig(r=2, alpha=6, decompose_factor=4, target_modules=TARGETS)
    other, layers = theirs(config, TALL, WIDE)
    pairs: list[Any] = []
    for delta, layer in zip(deltas, layers, strict=True):
        pairs += [(delta.C, layer.lokr_w1["default"], same), (delta.B, layer.lokr_w2_a["default"], same)]
        pairs += [(delta.A, layer.lokr_w2_b["default"], same)]
    compare(model, other, pairs)


@pytest.mark.parametrize("size", [TALL, WIDE], ids=["tall", "wide"])
def test_randlora(size: tuple[int, int]) -> None:
    """PEFT multiplies B's columns, numbered base by base, with A's rows, numbered row by row: B is given to it so."""
    model, deltas = ours(tt.methods()["randlora"](rank=5, alpha=7.0), size)
    other, layers = theirs(peft.RandLoraConfig(r=5, randlora_alpha=7, target_modules=["0"]), size)
    (delta,), (layer,) = deltas, layers

    def numbered(B: Tensor) -> Tensor:
        """Ours (n, long, rank) so that PEFT's flat column k·n + j is ours (j, k)."""
        n, long, rank = B.shape
        return B.permute(1, 2, 0).reshape(long, rank * n).reshape(long, n, rank)

    pairs = [
        (delta.shared.A, layer.randlora_A["default"], lambda A: A[:, None]),
        (delta.shared.B, layer.randlora_B["default"], numbered),
        (delta.lambda_, layer.randlora_lambda["default"], lambda one: one.mT),
        (delta.gamma, layer.randlora_gamma["default"], same),
    ]
    compare(model, other, pairs)


def test_vb_lora() -> None:
    model, deltas = ours(tt.methods()["vb_lora"](rank=3, vectors=10, length=8, k=2), TALL, WIDE)
    config = peft.VBLoRAConfig(r=3, num_vectors=10, vector_length=8, topk=2, target_modules=TARGETS)
    other, layers = theirs(config, TALL, WIDE)
    pairs: list[Any] = [(deltas[0].shared.bank, layers[0].vblora_vector_bank["default"], same)]
    for delta, layer in zip(deltas, layers, strict=True):
        pairs += [(delta.a, layer.vblora_logits_A["default"], same), (delta.b, layer.vblora_logits_B["default"], same)]
    compare(model, other, pairs)


def test_hira() -> None:
    model, deltas = ours(tt.methods()["hira"](rank=3), TALL, WIDE)
    other, layers = theirs(peft.HiraConfig(r=3, target_modules=TARGETS), TALL, WIDE)
    pairs: list[Any] = []
    for delta, layer in zip(deltas, layers, strict=True):
        pairs += [(delta.A, layer.hira_A["default"], same), (delta.B, layer.hira_B["default"], same)]
    compare(model, other, pairs)


def test_gralora() -> None:
    model, deltas = ours(tt.methods()["gralora"](rank=4, alpha=6.0, blocks=2), TALL, WIDE)
    other, layers = theirs(peft.GraloraConfig(r=4, alpha=6, gralora_k=2, target_modules=TARGETS), TALL, WIDE)
    pairs: list[Any] = []
    for delta, layer in zip(deltas, layers, strict=True):
        pairs += [(delta.A, layer.gralora_A["default"], lambda one: one.mT)]
        pairs += [(delta.B, layer.gralora_B["default"], lambda one: one.mT)]
    compare(model, other, pairs)


def test_lora_fa() -> None:
    """PEFT's is a LoRA whose A an optimizer freezes; the factor by which that rescales B's gradient is not compared."""
    from peft.optimizers import create_lorafa_optimizer

    model, deltas = ours(tt.methods()["lora_fa"](rank=4, alpha=12.0), TALL, WIDE)
    other, layers = theirs(peft.LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS), TALL, WIDE)
    create_lorafa_optimizer(other, r=4, lora_alpha=12, lr=1e-3)
    pairs: list[Any] = []
    for delta, layer in zip(deltas, layers, strict=True):
        assert not layer.lora_A["default"].weight.requires_grad
        pairs += [(delta.A, layer.lora_A["default"].weight, same), (delta.B, layer.lora_B["default"].weight, same)]
    compare(model, other, pairs)


def test_qa_lora_is_pefts_over_the_number_of_groups() -> None:
    """PEFT has it on GPTQ layers alone, so its branch runs beside a layer here; it multiplies by the groups, in / g."""
    from types import SimpleNamespace

    from peft.tuners.lora.variants import QALoraLinearVariant

    groups = 24 // 8
    model, (delta,) = ours(tt.methods()["qa_lora"](rank=3, alpha=6.0, group_size=8), TALL)
    A, B = nn.Linear(groups, 3, bias=False), nn.Linear(3, 40, bias=False)
    with torch.no_grad():
        A.weight.copy_(delta.A)
        B.weight.copy_(delta.B)
    branch = SimpleNamespace(
        lora_A={"default": A},
        lora_B={"default": B},
        lora_dropout={"default": nn.Identity()},
        scaling={"default": 6.0 / 3 / groups},
        qalora_group_size={"default": 8},
        in_features=24,
        training=True,
    )
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(5))
    frozen = model.layers[0]
    y = model(x)
    base = nn.functional.linear(x, frozen.weight, frozen.bias)
    z = QALoraLinearVariant.forward(branch, "default", x, base)
    agree(y, z, "outputs")
    y.square().mean().backward()
    z.square().mean().backward()
    agree(delta.A.grad, A.weight.grad, "gradient of A")
    agree(delta.B.grad, B.weight.grad, "gradient of B")
