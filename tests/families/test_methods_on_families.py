"""One method of each kind runs and trains on every model type of every family, with an attention mask and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import CAUSAL, build, run
from torch import Tensor

import trimtab as tt
from trimtab import laws
from trimtab.core.errors import UserError
from trimtab.core.family import tables

KINDS = ("lora", "houlsby", "loreft", "prompt_tuning", "prefix_tuning", "ln_tuning")
NO_TEXT = ("vit", "sam", "t5")
"""Families whose models take more than the ids of one text, and what `run` gives them."""


def hidden(output: Any) -> Tensor:
    """The first tensor with a gradient that a model returns."""
    return next(one for one in output.values() if isinstance(one, Tensor) and one.requires_grad)


@pytest.mark.parametrize("model_type", list(tables()))
def test_every_kind_of_method_trains_on_it(model_type: str) -> None:
    method_of, trained = laws.registered(), []
    for name in KINDS:
        model = build(model_type)
        try:
            tt.attach(model, method_of[name])
        except UserError:
            continue
        given: dict[str, Any] = {}
        if tables()[model_type].name in NO_TEXT:
            output = hidden(run.__wrapped__(model))
        else:
            given["input_ids"] = torch.arange(3, 9).view(1, 6).repeat(2, 1)
            output = hidden(model(**given))
            assert output.shape[:2] == (2, 6)
            masked = hidden(model(**given, attention_mask=torch.ones_like(given["input_ids"])))
            torch.testing.assert_close(masked, output, rtol=1e-4, atol=1e-4)
        output.square().mean().backward()
        trained.append(name)
        gradients = [one.grad for one in model.parameters() if one.requires_grad]
        assert any(grad is not None and float(grad.abs().max()) > 0 for grad in gradients), name
    assert "lora" in trained
    assert len(trained) >= 4


@pytest.mark.parametrize("model_type", [name for name, table in tables().items() if table.name not in NO_TEXT])
def test_a_prompt_is_the_models_own_embeddings_with_it_in_front(model_type: str) -> None:
    """Where texts are read from left to right; elsewhere it stands behind them, and every token still sees it."""
    model = build(model_type)
    ids = torch.arange(3, 9).view(1, 6)
    tt.attach(model, laws.registered()["prompt_tuning"])
    (P,) = (one for one in model.parameters() if one.requires_grad)
    with torch.no_grad():
        P.normal_(generator=torch.Generator().manual_seed(2))
        found = model(input_ids=ids)[0]
        plain = tt.detach(model)
        X = plain.get_input_embeddings()(ids)
        if reads_on(plain, ids):
            expected = plain(inputs_embeds=torch.cat([P[None], X], 1))[0][:, len(P) :]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        else:
            away = (found - plain(input_ids=ids)[0]).abs().amax(-1)
            assert float(away.min()) > 1e-3


TEXT = (11, 7, 23, 5)


@pytest.mark.parametrize("model_type", CAUSAL)
@pytest.mark.parametrize("name", ["prefix_tuning", "pre_layer"])
def test_a_prefix_that_starts_as_a_text_is_that_text_in_front(model_type: str, name: str) -> None:
    model = build(model_type)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5 if parameter.ndim > 1 else 1.0)  # so that attention looks at more than one token
    settings: dict[str, Any] = {"length": len(TEXT), "start": "text", "tokens": TEXT}
    method = tt.PreLayer(**settings) if name == "pre_layer" else tt.PrefixTuning(hidden=None, **settings)
    text, ids = torch.tensor([TEXT]), torch.arange(30, 38)[None]
    with torch.no_grad():
        expected = model(input_ids=torch.cat([text, ids], 1))[0][:, len(TEXT) :]
        tt.attach(model, method, statistics=tt.activations(model, [{"input_ids": text}], method.where))
        torch.testing.assert_close(
            model(input_ids=ids)[0], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
        )


def reads_on(model: Any, ids: Tensor) -> bool:
    """Whether the last token changes nothing of those before it."""
    other = ids.clone()
    other[0, -1] = 40
    return bool(torch.equal(model(input_ids=ids)[0][:, :-1], model(input_ids=other)[0][:, :-1]))
