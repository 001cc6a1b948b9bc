"""Methods that edit the ends of the prompt, in packs: the loss and gradients of every row on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import trimtab as tt
from trimtab.core.positions import marks
from trimtab.core.stack import prompts
from trimtab.data.encoded import Encoded
from trimtab.data.packing import Pack, pack
from trimtab.engine.attention import can_pack, edited_ends
from trimtab.engine.faster import running
from trimtab.engine.loss import loss_sum

WORDS = 61
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
MAKE = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
}
METHODS = {
    "loreft": tt.LoReFT(rank=2, first=3, last=4),
    "direft-last": tt.DiReFT(rank=2, first=0, last=2),
    "untied": tt.Untied(inner=tt.DiReFT(rank=2, first=5, last=3)),
    "beside-lora": [tt.LobiReFT(rank=2, first=2, last=1), tt.LoRA(rank=2)],
}


def rows() -> list[Encoded]:
    """Rows that share a system prompt, some the whole prompt, some a beginning that is short, or all prompt to one and
    half of it answer to another; and a row without any prompt."""
    draw = torch.Generator().manual_seed(7)

    def words(count: int) -> list[int]:
        return torch.randint(0, WORDS, (count,), generator=draw).tolist()

    def row(prompt: list[int], answer: list[int]) -> Encoded:
        return Encoded(prompt + answer, [False] * len(prompt) + [True] * len(answer))

    system, question = words(20), words(18)
    found = [row(system + words(3 + n), words(4)) for n in range(3)]
    found += [row(system + question, words(3 + n)) for n in range(3)]
    found += [row(system + question[:9], question[9:] + words(2)), row(system, question), found[3]]
    found += [row(system[:5], words(6)), row(system[:5] + words(1), words(6)), row([], words(9))]
    return found


def adapted(make: Any, method: Any) -> Any:
    """A model with the method on it, its tensors far from their start."""
    torch.manual_seed(0)
    model = tt.attach(make().eval(), method)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def alone(model: Any, given: Sequence[Encoded]) -> Tensor:
    """The loss summed over rows, each through the model by itself."""
    total = torch.zeros(())
    for row in given:
        ids, keep = torch.tensor([row.ids]), torch.tensor(row.trained[1:])
        labels = torch.where(torch.tensor([[False, *row.trained[1:]]]), ids, -100)
        with prompts(model, labels):
            logits = model(input_ids=ids).logits[0, :-1]
        total = total + F.cross_entropy(logits[keep], ids[0, 1:][keep], reduction="sum")
    return total


@pytest.mark.parametrize("share", [None, 4, 16])
@pytest.mark.parametrize(("make", "name"), [*(("llama", name) for name in METHODS), ("qwen3", "untied")])
def test_packed_gradients_equal_those_of_rows_alone(make: str, name: str, share: int | None) -> None:
    model = adapted(MAKE[make], METHODS[name])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    given = rows()
    expected = alone(model, given)
    wanted = torch.autograd.grad(expected, trained)
    assert can_pack(model, 64)
    packed = pack(given, share, edited_ends(model))
    assert (packed.ids.shape[1] < packed.row_tokens) == (share is not None)
    with running(model, packed=True):
        loss, _ = loss_sum(model, packed, "causal")
        found = torch.autograd.grad(loss, trained)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).abs().max()) <= 1e-5 * float(other.abs().max())


def test_sharing_what_only_one_row_edits_is_refused_and_would_be_wrong() -> None:
    """The same rows packed as if nothing were edited give another loss, so the test above can fail."""
    model = adapted(MAKE["llama"], METHODS["loreft"])
    given = rows()
    ends = edited_ends(model)
    assert ends is not None
    with running(model, packed=True), torch.no_grad():
        right, _ = loss_sum(model, pack(given, 4, ends), "causal")
        apart, _ = loss_sum(model, pack(given, None), "causal")
        with pytest.raises(tt.UserError, match="an adapter edits the first and last"):
            loss_sum(model, pack(given, 4), "causal")
        wrong, _ = loss_sum(model, replace(pack(given, 4), ends=ends), "causal")
    torch.testing.assert_close(apart, right)
    assert abs(float(right - wrong)) > 1e-2


def test_checkpointing_a_pack_keeps_its_positions() -> None:
    model = adapted(MAKE["llama"], METHODS["untied"]).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    packed = pack(rows(), 16, edited_ends(model))
    grads = []
    for policy in ("off", "block"):
        with running(model, packed=True, policy=policy):
            loss, _ = loss_sum(model, packed, "causal")
            grads.append(torch.autograd.grad(loss, trained) if policy == "off" else backward(loss, trained))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def backward(loss: Tensor, trained: list[Any]) -> list[Tensor]:
    loss.backward()
    return [parameter.grad for parameter in trained]


def test_a_common_prompt_is_shared_to_its_end_and_a_common_beginning_up_to_the_edited_end() -> None:
    prompt, ends = list(range(20)), ((3, 2), (0, 5))

    def row(prompt: list[int], answer: list[int]) -> Encoded:
        return Encoded(prompt + answer, [False] * len(prompt) + [True] * len(answer))

    same = pack([row(prompt, [30]), row(prompt, [31])], 4, ends)
    assert sizes(same) == [20, 1, 1]
    longer = pack([row(prompt, [30]), row([*prompt, 21, 22, 23], [31])], 4, ends)
    assert sorted(sizes(longer)) == [6, 9, 15], "the last five tokens of the shorter prompt are edited in one row only"
    far = pack([row(prompt, [30]), row([*prompt, *range(40, 50)], [31])], 4)
    assert sizes(far)[0] == 20, "without edits the prompt is shared whole"


def sizes(packed: Pack) -> list[int]:
    return [segment.stop - segment.start for segment in packed.segments]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 1), max_size=9), st.integers(1, 3)), min_size=1, max_size=7),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=2),
    st.integers(1, 4),
)
def test_every_token_of_a_pack_is_edited_as_in_each_of_its_rows(
    drawn: list[tuple[list[int], int]], ends: list[tuple[int, int]], share: int
) -> None:
    given = [Encoded(ids + [0] * more, [False] * len(ids) + [True] * more) for ids, more in drawn]
    packed = pack(given, share, ends)
    order, lengths = packed.positions[0].tolist(), packed.prompts[0].tolist()
    in_pack = set()
    for segment in packed.segments:
        path = [at for above in segment.ancestors for at in range(*span(packed, above))]
        path += range(segment.start, segment.stop)
        seen = [(packed.ids[0, at].item(), marks(order[at] + 1, lengths[at], ends)[-1]) for at in path]
        in_pack |= {tuple(seen[: end + 1]) for end in range(len(seen))}
    for row in given:
        prompt = next((at for at in range(1, len(row.ids)) if row.trained[at]), len(row.ids))
        assert tuple(zip(row.ids, marks(len(row.ids), prompt, ends), strict=True)) in in_pack


def span(packed: Pack, index: int) -> tuple[int, int]:
    return packed.segments[index].start, packed.segments[index].stop


def test_edits_of_the_prompt_are_not_packed_beside_virtual_tokens() -> None:
    model = MAKE["llama"]()
    assert edited_ends(model) == ()
    tt.attach(model, tt.LoReFT(rank=2))
    tt.attach(model, tt.Untied(), name="other")
    assert edited_ends(model) == ((7, 7), (7, 0), (0, 7))
    tt.attach(model, tt.PrefixTuning(length=3, hidden=None), name="third")
    assert not can_pack(model, 64)
