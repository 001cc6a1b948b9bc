"""Parts of fused weights: some rows of every head, and one range of rows as the case of one group."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import trimtab as tt
from trimtab.core.rows import Rows
from trimtab.core.select import select

CASES = [
    (Rows(2, 5), [2, 3, 4]),
    (Rows(0, 12), [*range(12)]),
    (Rows(1, 3, 3), [1, 2, 5, 6, 9, 10]),
    (Rows(0, 1, 4), [0, 3, 6, 9]),
]


@pytest.mark.parametrize(("rows", "index"), CASES)
@pytest.mark.parametrize("dim", [0, 1, -1, -2])
def test_rows_are_those_of_numpys_index(rows: Rows, index: list[int], dim: int) -> None:
    whole = torch.randn(12, 12)
    part = torch.randn([len(index) if at == dim % 2 else 12 for at in range(2)])
    there = np.moveaxis(whole.numpy().copy(), dim, 0)
    assert len(rows) == len(index)
    assert np.array_equal(np.moveaxis(rows.of(whole, dim).numpy(), dim, 0), there[index])
    put = np.moveaxis(rows.put(whole, part, dim).numpy(), dim, 0)
    there[index] = np.moveaxis(part.numpy(), dim, 0)
    assert np.array_equal(put, there)
    among = np.moveaxis(rows.among(part, 12, dim).numpy(), dim, 0)
    there[[at for at in range(12) if at not in index]] = 0
    assert np.array_equal(among, there)


def neox(**changes: Any) -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = GPTNeoXConfig(**sizes, num_attention_heads=4, max_position_embeddings=32, initializer_range=0.2, **changes)
    return GPTNeoXForCausalLM(config).eval()


IDS = torch.arange(3, 11)[None]


def test_the_values_of_every_head_and_nothing_else_change() -> None:
    """Against the weight with the update written into its (head, 3, size) view by hand."""
    model, by_hand = neox(), neox()
    tt.attach(model, tt.LoRA(rank=2, alpha=4.0), "v")
    with torch.no_grad():
        for place in select(model, "v"):
            delta = model.get_submodule(place.module).delta["default:v"]
            delta.B.normal_()
            weight = by_hand.get_submodule(place.module).weight
            weight.view(4, 3, 8, 32)[:, 2] += (2.0 * delta.B @ delta.A).view(4, 8, 32)
        torch.testing.assert_close(model(IDS).logits, by_hand(IDS).logits, rtol=1e-4, atol=1e-5)
        tt.merge(model)
    for one, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_rows_of_a_batch_with_adapters_of_their_own() -> None:
    model = neox()
    tt.quantize(model, tt.Absmax())
    for name, where in (("a", "q, v"), ("b", "all-linear"), ("c", "k, o")):
        tt.attach(model, tt.LoRA(rank=2, start="B"), where, name=name)
    with torch.no_grad():
        for one in model.parameters():
            if one.requires_grad:
                one.normal_(std=0.3)
        ids, names = torch.arange(24).reshape(4, 6), ["b", "a", "c", "b"]
        alone = torch.cat([tt.activate(model, name)(ids[at : at + 1]).logits for at, name in enumerate(names)])
        torch.testing.assert_close(tt.activate(model, names)(ids).logits, alone, rtol=1e-4, atol=1e-4)


def test_what_a_start_takes_out_of_some_rows_stays_out_of_the_codes() -> None:
    model = neox()
    W = copy.deepcopy(model.gpt_neox.layers[0].attention.query_key_value.weight.detach())
    tt.attach(model, tt.LoRA(rank=2, start=tt.PiSSA(rounds=1)), "q, v", quantize=tt.Absmax())
    code = model.gpt_neox.layers[0].attention.query_key_value.code
    up, down = (code.tensors()[name] for name in ("up", "down"))
    assert torch.equal(up.view(4, 3, 8, 4)[:, 1], torch.zeros(4, 8, 4))
    torch.testing.assert_close(code.dense(), W, rtol=0, atol=0.01 * float(W.abs().max()))
    U, S, V = torch.linalg.svd(W.view(4, 3, 8, 32)[:, 2].reshape(32, 32))
    taken = (up @ down).view(4, 3, 8, 32)[:, 2].reshape(32, 32)
    torch.testing.assert_close(taken, U[:, :2] * S[:2] @ V[:2], rtol=1e-3, atol=1e-4)


def test_pruning_touches_the_rows_that_are_named() -> None:
    model, before = neox(), neox()
    tt.prune(model, 0.5, "q")
    for layer, old in zip(model.gpt_neox.layers, before.gpt_neox.layers, strict=True):
        new = layer.attention.query_key_value.weight.view(4, 3, 8, 32)
        was = old.attention.query_key_value.weight.view(4, 3, 8, 32)
        assert torch.equal(new[:, 1:], was[:, 1:])
        assert int((new[:, 0] == 0).sum()) == 512
        kept = new[:, 0] != 0
        assert torch.equal(new[:, 0][kept], was[:, 0][kept])
        assert float(was[:, 0][kept].abs().min()) >= float(was[:, 0][~kept].abs().max())
