"""Evaluation mode for a while leaves every module in the mode it was in."""

from __future__ import annotations

import pytest
from torch import nn

from trimtab.core.modes import evaluating


def test_every_module_goes_back_to_its_own_mode() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    model.train()
    model[1][0].eval()  # statistics frozen on purpose
    before = [module.training for module in model.modules()]
    within: list[bool] = []

    def interrupted() -> None:
        with evaluating(model):
            within.extend(module.training for module in model.modules())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        interrupted()
    assert not any(within)
    assert [module.training for module in model.modules()] == before
    assert before.count(False) == 1
