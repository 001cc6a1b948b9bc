"""Past the last attention of a causal model only tokens go on at which something is predicted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.engine.test_faster import WORDS, agree, decoder, trained
from torch import Tensor, nn

import trimtab as tt
from trimtab.data.encode import Encoded
from trimtab.data.packing import Pack, pack
from trimtab.engine.faster import running
from trimtab.engine.loss import ends_with_head, loss_sum

METHODS: dict[str, Any] = {
    "lora": (tt.LoRA(rank=4), "all-linear"),
    "full": (tt.Full(), "o, down@0:"),
    "prompt": (tt.PromptTuning(length=3), None),
    "prefix": (tt.PrefixTuning(length=2, hidden=None), None),
    "reft": (tt.LoReFT(rank=2, first=1, last=1), None),
    "bottleneck": (tt.Houlsby(bottleneck=4), None),
}


def packed() -> Pack:
    draw = torch.Generator().manual_seed(3)
    common = torch.randint(3, WORDS, (20,), generator=draw).tolist()
    rows = []
    for own in (6, 9, 4):
        ids = common + torch.randint(3, WORDS, (own,), generator=draw).tolist()
        rows.append(Encoded(tuple(ids), tuple(at >= len(ids) - 3 for at in range(len(ids)))))
    return pack(rows)


def attached(name: str, kind: str) -> nn.Module:
    method, where = METHODS[kind]
    return trained(tt.attach(decoder(name), method, where))


def step(model: nn.Module, pieces: tuple[str, ...], policy: str = "off") -> tuple[float, dict[str, Tensor], list[int]]:
    """Loss, gradients, and how many tokens the last feed-forward's first product saw."""
    seen: list[int] = []
    gate = model.model.layers[-1].mlp.gate_proj  # type: ignore[union-attr,index]
    handle = gate.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-2]))
    model.train().zero_grad(set_to_none=True)
    assert ends_with_head(model)  # tries three tokens
    with running(model, packed=True, pieces=pieces, policy=policy):
        seen.clear()
        loss, _ = loss_sum(model, packed(), "causal")
        loss.backward()
    handle.remove()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, seen


@pytest.mark.parametrize("policy", ["off", "block", "sqrt", "selective"])
@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_gradients_are_those_of_all_tokens(name: str, kind: str, policy: str) -> None:
    model = attached(name, kind)
    classes = [type(module) for module in model.modules()]
    plain_loss, plain, all_tokens = step(model, ())
    loss, ours, few = step(model, ("last",), policy)
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    agree(ours, plain)
    assert [type(module) for module in model.modules()] == classes
    tokens, read = packed().ids.shape[1], len(packed().segments.read)  # type: ignore[attr-defined]
    assert read < tokens / 3
    assert set(all_tokens) == {tokens + 3 * (kind == "prompt") + 2 * (kind == "prefix")}
    edits = kind == "bottleneck"  # edits activations: it might go by their place
    assert set(few) == (set(all_tokens) if edits else {read})
    assert len(few) == (1 if policy == "off" else 2)


def test_where_most_tokens_are_read_all_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.engine.last_block.MOST", 0.1)
    _, _, seen = step(attached("llama", "lora"), ("last",))
    assert seen == [packed().ids.shape[1]]


def test_whoever_reads_all_tokens_gets_them() -> None:
    model = attached("llama", "lora").eval()
    ids = packed().ids
    with torch.no_grad(), running(model, packed=True, pieces=("last",)):
        expected = model(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids).logits, expected)
    with torch.no_grad():
        assert model.generate(ids[:, :5], max_new_tokens=3, do_sample=False).shape == (1, 8)  # type: ignore[operator]


class Mixing(nn.Module):
    """A feed-forward in which tokens meet."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = plain.gate_proj, plain.up_proj, plain.down_proj

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.gate_proj(x).relu() * self.up_proj(x))  # type: ignore[operator]
        return y.cumsum(1)


def test_a_feed_forward_in_which_tokens_meet_sees_all() -> None:
    model = decoder("llama")
    last: Any = model.model.layers[-1]  # type: ignore[union-attr,index]
    last.mlp = Mixing(last.mlp)
    tt.attach(model, tt.LoRA(rank=2), "q")
    _, plain, all_tokens = step(trained(model), ())
    _, ours, seen = step(model, ("last",))
    agree(ours, plain)
    assert seen == all_tokens
