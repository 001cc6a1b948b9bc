"""Calibration: every block is coded for inputs that come from the coded blocks before it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab.core.calibrate import Flow
from trimtab.core.errors import UserError
from trimtab.core.quantized import quantized_modules

FORMAT = tt.GPTQ(3, 16)


def llama(seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data *= 4
    return model


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


def batches(count: int = 6, seed: int = 5, **more: Any) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        ids = torch.randint(3, 64, (2, 24), generator=draw)
        mask = torch.ones_like(ids)
        mask[1, 12 + number :] = 0
        found.append({"input_ids": ids, "attention_mask": mask, **{key: ids for key in more}})
    return found


def codes(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    return {path: module.code.tensors() for path, module in quantized_modules(model)}  # type: ignore[operator,union-attr]


def same(one: nn.Module, other: nn.Module) -> float:
    """Share of equal bytes of codes."""
    left, right = codes(one), codes(other)
    assert left.keys() == right.keys()
    pairs = [(left[path]["codes"], right[path]["codes"]) for path in left]
    return sum(int((a == b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


def test_a_block_is_coded_for_what_the_coded_blocks_before_it_give() -> None:
    dense = llama()
    model = tt.calibrate(copy.deepcopy(dense), FORMAT, batches())
    mixed = copy.deepcopy(model)
    mixed.model.layers[1] = copy.deepcopy(dense.model.layers[1])
    seen: list[Tensor] = []
    layer = mixed.model.layers[1].self_attn.k_proj
    for batch in batches():
        hook = layer.register_forward_pre_hook(
            lambda m, args, batch=batch: seen.append(args[0][batch["attention_mask"].bool()])
        )
        with torch.no_grad():
            mixed(**batch)
        hook.remove()
    X = torch.cat(seen).double()
    wanted = FORMAT.encode_for(layer.weight, X.T @ X)
    found = model.model.layers[1].self_attn.k_proj.code.tensors()
    assert (wanted["codes"] == found["codes"]).float().mean() > 0.99
    torch.testing.assert_close(wanted["scale"], found["scale"], rtol=1e-3, atol=1e-5)


def test_it_computes_more_alike_than_rounding_to_the_nearest() -> None:
    dense = llama()
    coded = tt.calibrate(copy.deepcopy(dense), FORMAT, batches(12))
    rounded = tt.quantize(copy.deepcopy(dense), tt.Affine(3, 16))
    assert codes(coded).keys() == codes(rounded).keys()
    batch = batches(4, seed=9)[0]
    with torch.no_grad():
        wanted, mine, plain = (m(**batch).logits for m in (dense, coded, rounded))
    assert (mine - wanted).norm() < 0.9 * (plain - wanted).norm()


@pytest.mark.parametrize("model", [llama, t5], ids=["decoder", "encoder and decoder"])
def test_blocks_run_by_themselves_give_what_the_whole_model_gives(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = batches(labels=True) if model is t5 else batches()
    one = tt.calibrate(model(), FORMAT, rows)
    made: list[Any] = []
    monkeypatch.setattr(Flow, "of", classmethod(lambda cls, *args: made.append(args)))
    other = tt.calibrate(model(), FORMAT, rows)
    assert made
    assert same(one, other) > 0.99


def test_only_a_chain_of_blocks_is_run_by_itself() -> None:
    from trimtab.core.calibrate import in_order, stages_of
    from trimtab.core.quantized import targets

    for make, chained in ((llama, True), (t5, False)):
        model, rows = make(), batches(2, labels=True)
        call = lambda model, batch: model(**batch, use_cache=False)  # noqa: E731
        stages = in_order(model, stages_of(model, targets(model, FORMAT)), call, rows[0])
        with torch.no_grad():
            assert (Flow.of(model, stages, call, rows) is not None) is chained


def test_the_model_is_left_as_it_was_but_for_its_weights() -> None:
    model = llama().train()
    tt.calibrate(model, FORMAT, batches(2), where="q, v")
    assert model.training
    assert model.config.use_cache is True
    assert len(codes(model)) == 6
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    out = model(**batches(1)[0]).logits.sum()
    out.backward()
    assert model.model.embed_tokens.weight.grad is not None


def test_a_plain_stack_of_layers_is_coded_layer_by_layer() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    rows = [{"x": torch.randn(50, 16)}]
    net = tt.calibrate(net, tt.GPTQ(4, 8), rows, where="*", run=lambda model, batch: model(batch["x"]))
    assert len(codes(net)) == 2


def test_a_layer_that_saw_nothing_is_rounded_and_named() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Idle()
    wanted = tt.Affine(4, 8).encode(model.idle.weight)["codes"]
    with pytest.warns(UserWarning, match="idle saw no input"):
        tt.calibrate(model, tt.GPTQ(4, 8), [{"x": torch.randn(40, 16)}], where="*")
    assert torch.equal(codes(model)["idle"]["codes"], wanted)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: tt.calibrate(llama(), tt.NF4(), batches(1)), "needs no inputs"),
        (lambda: tt.calibrate(llama(), FORMAT, []), "no batch"),
        (lambda: tt.quantize(llama(), FORMAT), "no inputs were given"),
        (lambda: tt.calibrate(llama(), tt.GPTQ(4, 24), batches(1)), "does not divide"),
        (lambda: tt.SVDQuant(inner=tt.GPTQ()), "cannot store the rest"),
    ],
)
def test_what_cannot_be_calibrated_is_said(make: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        make()


def test_smoothed_codes_change_the_loss_less() -> None:
    """In a model some of whose hidden values are large, of the size of its outputs."""
    model = llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[:2] = 40.0
    given = batches()
    with torch.no_grad():
        wanted = model(**given[0]).logits
    errors = []
    for smooth in (False, True):
        format, coded = tt.SVDQuant(inner=tt.Affine(3, 16), rank=2, smooth=smooth), copy.deepcopy(model)
        coded = tt.calibrate(coded, format, given) if smooth else tt.quantize(coded, format)
        with torch.no_grad():
            errors.append(float((coded(**given[0]).logits - wanted).norm() / wanted.norm()))
    assert errors[1] < 0.7 * errors[0]


def test_adapters_train_over_it_and_merge_into_its_scales() -> None:
    model = tt.calibrate(llama(), tt.GPTQ(4, None), batches(2))
    tt.attach(model, tt.PEQA())
    batch = batches(1)[0]
    model(**batch, labels=batch["input_ids"]).loss.backward()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            assert parameter.grad is not None
            assert float(parameter.grad.abs().sum()) > 0
            parameter.add_(0.1 * torch.randn_like(parameter))
        before = model(**batch).logits
        after = tt.merge(model)(**batch).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert len(codes(model)) == 21
