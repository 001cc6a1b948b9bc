"""Checkpointing changes memory and time, never a gradient: packed rows, virtual tokens and quantized bases too."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.test_packing import gpt2, llama, qwen, rows_with_common_beginnings
from torch import Tensor, nn

import trimtab as tt
from trimtab.core import product
from trimtab.core.errors import UserError
from trimtab.data.batches import collate
from trimtab.data.packing import pack
from trimtab.engine import rerun as rerunning
from trimtab.engine import selective
from trimtab.engine.checkpointing import POLICIES, checkpointing, stacks_of
from trimtab.engine.faster import running
from trimtab.engine.loss import loss_sum

MODELS = {"llama": llama, "qwen": qwen, "gpt2": gpt2}
METHODS = {
    "lora": lambda: tt.LoRA(rank=2),
    "houlsby": lambda: tt.Houlsby(bottleneck=4),
    "prefix": lambda: tt.PrefixTuning(length=3, hidden=8),
    "full": lambda: tt.Full(),
    "hira": lambda: tt.HiRA(rank=2),
}


def ready(name: str, method: str) -> nn.Module:
    torch.manual_seed(0)
    model = tt.attach(MODELS[name](), METHODS[method]())
    for parameter in model.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter += 0.05 * torch.randn_like(parameter)
    return model.train()


def gradients(model: nn.Module, batch: Any, policy: str) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    with running(model, packed=not isinstance(batch, dict), policy=policy):
        loss_sum(model, batch, "causal")[0].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def agree(ours: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    assert plain
    assert ours.keys() == plain.keys()
    for name, expected in plain.items():
        assert (ours[name] - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1e-8), name


@pytest.mark.parametrize("policy", POLICIES[1:])
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("name", list(MODELS))
def test_gradients_are_those_without(name: str, method: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rerunning, "LEAST", 1)
    monkeypatch.setattr(selective, "LEAST", 1)
    model = ready(name, method)
    batches: list[Any] = [collate(rows_with_common_beginnings(), 0)]
    if method != "prefix":
        batches.append(pack(rows_with_common_beginnings()))
    for batch in batches:
        agree(gradients(model, batch, policy), gradients(model, batch, "off"))


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_over_a_quantized_base(policy: str) -> None:
    torch.manual_seed(0)
    model = llama()
    tt.quantize(model, tt.Absmax())
    tt.attach(model, tt.LoRA(rank=2))
    batch = pack(rows_with_common_beginnings())
    agree(gradients(model.train(), batch, policy), gradients(model, batch, "off"))


@pytest.mark.parametrize("policy", ["block", "sqrt", "selective", "offload"])
def test_less_is_kept_for_backward(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rerunning, "LEAST", 1)
    model, batch = ready("llama", "lora"), collate(rows_with_common_beginnings(), 0)

    def kept(chosen: str) -> int:
        held: dict[int, int] = {}

        def hold(tensor: Tensor) -> Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with running(model, packed=False, policy=chosen), torch.autograd.graph.saved_tensors_hooks(hold, lambda t: t):
            loss_sum(model, batch, "causal")
        return sum(held.values())

    assert kept(policy) < kept("off")


def test_offloaded_tensors_are_files_that_go_away(tmp_path: Path) -> None:
    parked = rerunning.Parked(torch.arange(5.0), str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 1
    assert torch.equal(parked.tensor(), torch.arange(5.0))
    del parked
    assert not list(tmp_path.iterdir())


def test_a_full_disk_for_what_is_offloaded_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UserError, match=r"offload could not write 20 bytes to .*: No space left"):
        rerunning.Parked(torch.arange(5.0), str(tmp_path))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="no stack of blocks"), checkpointing(nn.Linear(2, 2), "block"):
        pass


def test_the_blocks_are_the_deepest_stack_and_come_back_as_they_were() -> None:
    model = llama()
    assert stacks_of(model) == [list(model.model.layers)]
    before = [type(block) for block in model.model.layers]
    with checkpointing(model, "sqrt"):
        assert [type(block) for block in model.model.layers] != before
    assert [type(block) for block in model.model.layers] == before
    assert not any("_trimtab_again" in block.__dict__ for block in model.model.layers)


def test_both_stacks_of_an_encoder_decoder_run_again() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=30, d_model=16, d_ff=24, d_kv=4, num_layers=2, num_heads=4))
    assert stacks_of(model) == [list(model.encoder.block), list(model.decoder.block)]


def test_a_block_leaves_one_node_and_a_shared_network_takes_torchs_way() -> None:
    model, batch = ready("llama", "lora"), collate(rows_with_common_beginnings(), 0)
    with running(model, packed=False, policy="block"):
        summed, _ = loss_sum(model, batch, "causal")
    names, waiting = [], [summed.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None:
            names.append(node.name())
            waiting += [one for one, _ in node.next_functions]
    assert names.count("_RerunBackward") == len(model.model.layers)
    assert len(names) < 12 * len(model.model.layers)
    assert not rerunning.can_rerun((object(),))


def test_what_a_block_draws_is_drawn_again_and_what_needs_no_gradient_leaves_nothing() -> None:
    def run(x: Tensor, *, scale: float, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        noise = torch.rand_like(x)
        return x * noise * scale + pair[0], {"noise": noise, "count": torch.tensor([3])}

    torch.manual_seed(0)
    x, pair = torch.randn(4, requires_grad=True), (torch.zeros(4), torch.ones(4))
    (out, more) = rerunning.rerun(run, (x,), {"scale": 2.0, "pair": pair})
    torch.rand(7)
    after = torch.get_rng_state()
    out.sum().backward()
    assert torch.equal(x.grad, 2 * more["noise"])
    assert int(more["count"]) == 3
    assert torch.equal(torch.get_rng_state(), after)


def test_the_shelf_holds_every_input_in_one_piece() -> None:
    shelf = rerunning.Shelf(3)
    given = [torch.full((2, 5), float(at)) for at in range(3)]
    kept = [shelf.put(one) for one in given]
    assert len({one.untyped_storage().data_ptr() for one in kept}) == 1
    assert all(torch.equal(one, expected) for one, expected in zip(kept, given, strict=True))
    assert shelf.put(torch.zeros(2, 4)).untyped_storage().data_ptr() != kept[0].untyped_storage().data_ptr()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_selective_hands_out_narrow_products_and_attention(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "LARGE", 0)
    monkeypatch.setattr(selective, "LEAST", 1)
    handed: list[str] = []
    run = selective.SecondRun.__torch_dispatch__

    def watched(self: Any, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        held = {id(part) for step in self.left[-1:] for part in step.held}
        out = run(self, operator, types, args, kwargs)
        if id(out[0] if isinstance(out, tuple) else out) in held:
            handed.append(operator.name().rpartition("::")[2].partition(".")[0])
        return out

    monkeypatch.setattr(selective.SecondRun, "__torch_dispatch__", watched)
    model, batch = ready("llama", method), pack(rows_with_common_beginnings())
    ours = gradients(model, batch, "selective")
    agree(ours, gradients(model, batch, "off"))
    layers = model.config.num_hidden_layers  # type: ignore[union-attr]
    wanted = {"lora": ("_linear_pointwise",), "full": ("mm", "addmm", "linear")}[method]  # mm is x Aᵀ of LoRA
    products = [name for name in handed if name in wanted]
    assert len(products) == 5 * layers, "q, k, v, the way out of attention, and down"
    assert any("scaled_dot_product" in name for name in handed)


def test_a_second_run_that_takes_another_way_computes_all() -> None:
    x, W = torch.randn(4, 8), torch.randn(6, 8)
    with selective.FirstRun() as seen:
        y = x @ W.mT
    steps = seen.kept(selective.Results(1, on_cpu=False))
    with selective.SecondRun([step._replace(held=(y + 1,)) for step in steps]):
        assert torch.equal(x @ W.mT, y + 1)
    with selective.SecondRun([step._replace(held=(y + 1,)) for step in steps]):
        assert torch.equal(x[:2] @ W.mT, y[:2])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_only_what_is_changed_in_place_is_not_kept(device: str) -> None:
    """Through a view that has a count of changes of its own too, and where memory has no address."""
    x, W = torch.ones(3, 4, 8, device=device), torch.ones(8, 8, device=device)
    results = selective.Results(1, on_cpu=False)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(selective, "LEAST", 1)
        with results.first() as held:
            kept, changed = x @ W, x @ W
            changed += 1
            kept + changed
    assert [bool(step.held) for step in held()] == [True, False]


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_freed_memory_goes_back_around_the_blocks_where_they_are_large(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("trimtab.engine.checkpointing.trim", lambda: told.append("back"))
    model, batch = ready("llama", "lora"), collate(rows_with_common_beginnings(), 0)
    gradients(model, batch, policy)
    assert not told
    monkeypatch.setattr("trimtab.engine.checkpointing.WORTH", 1)
    gradients(model, batch, policy)
    assert told == ["back", "back"]
    told.clear()
    gradients(model, batch, "off")
    with torch.no_grad(), checkpointing(model, policy):
        loss_sum(model, batch, "causal")
    assert not told
