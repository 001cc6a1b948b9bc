"""Labelled rows end to end give an encoder the loss and gradients of every row on its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import trimtab as tt
from trimtab.data.batches import collate
from trimtab.data.encoded import Encoded
from trimtab.data.packing import bag
from trimtab.engine.checkpointing import POLICIES
from trimtab.engine.encoder import Seam, exact, seam_of
from trimtab.engine.faster import running
from trimtab.engine.loss import Batch, loss_sum, terms_of
from trimtab.engine.row_attention import row_attention

WORDS, PAD = 61, 1
SMALL: dict[str, Any] = dict(
    vocab_size=WORDS,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=40,
    pad_token_id=PAD,
    num_labels=3,
)
MODELS: dict[str, Any] = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SMALL)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SMALL, type_vocab_size=2)),
    "electra": lambda: ElectraForSequenceClassification(ElectraConfig(**SMALL, embedding_size=16)),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=WORDS,
            dim=32,
            hidden_dim=48,
            n_layers=3,
            n_heads=4,
            pad_token_id=PAD,
            num_labels=SMALL["num_labels"],
        )
    ),
}
FIRST = {"bert": 0, "roberta": PAD + 1, "electra": 0, "distilbert": 0}


def rows(kind: str = "classes") -> list[Encoded]:
    """Seven rows of 4 to 20 tokens, two of one length, the second half of each in segment 1."""
    draw = torch.Generator().manual_seed(5)
    made = []
    for index, length in enumerate((9, 4, 20, 13, 4, 6, 17)):
        ids = torch.randint(2, WORDS, (length,), generator=draw).tolist()
        label = index % 3 if kind == "classes" else index / 4
        made.append(Encoded(ids, [False] * length, label, [int(2 * at >= length) for at in range(length)], index))
    return made


def untyped(given: list[Encoded]) -> list[Encoded]:
    return [Encoded(row.ids, row.trained, row.label) for row in given]


def tuned(name: str, method: Any = None) -> nn.Module:
    """A model without dropout, with an adapter that has moved."""
    torch.manual_seed(3)
    model: nn.Module = MODELS[name]().eval()
    tt.attach(model, method or tt.LoRA(rank=2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def gradients(model: nn.Module, parts: list[Batch], seam: Seam | None, task: str = "classify", **how: Any) -> Any:
    model.zero_grad()
    terms, total = sum(map(terms_of, parts)), 0.0
    for part in parts:
        with running(model, packed=not isinstance(part, dict), seam=seam, **how):
            loss = loss_sum(model, part, task)[0] / terms
            loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(found: Any, expected: Any) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys() != set()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("task", ["classify", "regress"])
def test_rows_end_to_end_are_rows_alone(name: str, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = rows("classes" if task == "classify" else "numbers")
    monkeypatch.setitem(SMALL, "num_labels", 3 if task == "classify" else 1)
    if name == "distilbert":
        given = untyped(given)
    model = tuned(name)
    seam = seam_of(model, given, PAD)
    assert seam is not None
    assert seam.first_position == FIRST[name]
    expected = gradients(model, [collate([row], PAD) for row in given], None, task)
    start = seam.first_position
    same(gradients(model, [bag(given, start)], seam, task), expected)
    same(gradients(model, [bag(given[:4], start), bag(given[4:], start)], seam, task), expected)


@pytest.mark.parametrize("name", ["bert", "roberta", "electra"])
def test_the_seam_is_before_the_last_feed_forward(name: str) -> None:
    seam = seam_of(tuned(name), rows(), PAD)
    assert seam is not None
    assert seam.path.endswith("layer.2.attention")


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_under_checkpointing(policy: str) -> None:
    model = tuned("bert").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.attention_probs_dropout_prob = 0.0
    for layer in model.bert.encoder.layer:
        layer.attention.self.dropout.p = 0.0
    given = rows()
    seam = seam_of(model, given, PAD)
    expected = gradients(model, [collate([row], PAD) for row in given], None)
    same(gradients(model, [bag(given)], seam, policy=policy), expected)


def test_with_adapters_after_the_seam() -> None:
    model, given = tuned("bert", tt.Houlsby(bottleneck=4)), rows()
    seam = seam_of(model, given, PAD)
    expected = gradients(model, [collate([row], PAD) for row in given], None)
    same(gradients(model, [bag(given)], seam), expected)


def test_over_a_quantized_base() -> None:
    torch.manual_seed(3)
    model = MODELS["bert"]().eval()
    tt.quantize(model, tt.NF4(block_size=16))
    tt.attach(model, tt.LoRA(rank=2))
    given = rows()
    seam = seam_of(model, given, PAD)
    expected = gradients(model, [collate([row], PAD) for row in given], None)
    same(gradients(model, [bag(given)], seam), expected)


def test_no_seam_where_rows_mix_otherwise() -> None:
    """A relative bias over the whole sequence, a mean over all tokens, a local window, positions of a padded batch."""
    torch.manual_seed(3)
    assert seam_of(MPNetForSequenceClassification(MPNetConfig(**SMALL)).eval(), untyped(rows()), PAD) is None
    settings = SMALL | dict(classifier_pooling="mean", cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3)
    modern = ModernBertForSequenceClassification(ModernBertConfig(**settings, local_attention=8)).eval()
    assert seam_of(modern, untyped(rows()), PAD) is None
    model = MODELS["bert"]().eval()
    tt.attach(model, tt.PrefixTuning(length=2))
    assert seam_of(model, rows(), PAD) is None


def test_a_wrong_seam_is_found_out() -> None:
    model = tuned("roberta")
    right = seam_of(model, rows(), PAD)
    assert right is not None
    assert exact(model, right, rows(), PAD)
    assert not exact(model, Seam(right.path, 0), rows(), PAD)
    assert not exact(model, Seam("roberta.encoder.layer.1", right.first_position), rows(), PAD)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_rounding_does_not_hide_a_wrong_seam(name: str, kind: torch.dtype) -> None:
    """At a model's own precision a wrong one can be off by less than rounding may be."""
    torch.manual_seed(3)
    fresh, given = MODELS[name]().eval(), untyped(rows()) if name == "distilbert" else rows()
    assert seam_of(copy.deepcopy(fresh).to(kind), given, PAD) == seam_of(fresh, given, PAD)
    model = tuned(name).to(kind)
    before = {key: (value.data_ptr(), value.clone()) for key, value in model.state_dict().items()}
    seam = seam_of(model, given, PAD)
    assert seam == seam_of(tuned(name), given, PAD)
    assert seam is not None
    for key, value in model.state_dict().items():
        assert value.data_ptr() == before[key][0]
        assert torch.equal(value, before[key][1])
    tt.detach(model)
    tt.quantize(model, tt.NF4(), "query, key, value" if name != "distilbert" else "q_lin, v_lin")
    assert seam_of(model, given, PAD) == seam


def test_long_rows_take_torchs_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = tuned("bert"), rows()
    seam = seam_of(model, given, PAD)
    expected = gradients(model, [collate([row], PAD) for row in given], None)
    monkeypatch.setattr("trimtab.engine.row_attention.SHORT", 6)
    same(gradients(model, [bag(given)], seam), expected)


def test_dropped_scores_keep_their_mean_and_gradient() -> None:
    packed = bag([Encoded([5] * length, [False] * length, 0) for length in (3, 5, 4)])
    q, k, v = (torch.randn(1, 2, 12, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        plain = row_attention(packed, q, k, v, None, 0.0)
        mean = torch.stack([row_attention(packed, q, k, v, None, 0.3) for _ in range(600)]).mean(0)
    assert (mean - plain).abs().max() < 0.15
    assert torch.autograd.gradcheck(lambda *inputs: dropped_with(packed, inputs), (q, k, v))


def dropped_with(packed: Any, inputs: Any) -> torch.Tensor:
    """Attention with the same drops every time."""
    torch.manual_seed(1)
    result: torch.Tensor = row_attention(packed, *inputs, None, 0.3)
    return result


def test_groups_pad_little() -> None:
    packed = bag(rows())
    assert [one.places.shape[1] for one in packed.groups] == [6, 20]
    assert packed.groups[-1].stop == packed.ids.shape[1] == sum(len(row.ids) for row in rows())
    for row, start in zip(rows(), packed.first.tolist(), strict=True):
        assert packed.ids[0, start : start + len(row.ids)].tolist() == row.ids
