"""PEQA: counts of the paper, exact merging into codes of every group size, what is refused."""

from __future__ import annotations

import pytest
import torch

import trimtab as tt


def test_counts_of_llama_7b() -> None:
    """Per output: 4 x 4096 + 2 x 11008 + 4096 in each of 32 layers, 1.36 million as the paper says."""
    outs = {"q": 4096, "k": 4096, "v": 4096, "o": 4096, "gate": 11008, "up": 11008, "down": 4096}
    with torch.device("meta"):
        layers = torch.nn.ModuleDict(
            {name: torch.nn.Linear(11008 if name == "down" else 4096, out, bias=False) for name, out in outs.items()}
        )
    tt.attach(layers, tt.PEQA())
    assert 32 * sum(one.numel() for one in layers.parameters() if one.requires_grad) == 1_359_872


@pytest.mark.parametrize(
    ("format", "method"),
    [
        (tt.Affine(group_size=8), tt.PEQA()),
        (tt.Affine(group_size=8), tt.PEQA(group_size=8)),
        (tt.Affine(3, group_size=8), tt.PEQA(group_size=16)),
        (tt.Absmax(), tt.PEQA()),
    ],
    ids=str,
)
def test_merging_changes_scales_and_no_integer(format: tt.Format, method: tt.Method) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 12))
    tt.quantize(model, format)
    tt.attach(model, method)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    before = {name: one.clone() for name, one in model[0].code.tensors().items()}
    x = torch.randn(5, 32)
    wanted = model(x)
    tt.merge(model)
    after = model[0].code.tensors()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed in (["scale"], ["absmax"])
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-6)


def test_groups_that_do_not_fit_are_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 12))
    tt.quantize(model, tt.Affine(group_size=16))
    with pytest.raises(tt.UserError, match="group_size=8; 0 has 32 inputs, grouped by 16"):
        tt.attach(model, tt.PEQA(group_size=8))
    with pytest.raises(tt.UserError, match="has 32 inputs"):
        tt.attach(torch.nn.Sequential(torch.nn.Linear(32, 12)), tt.PEQA(group_size=5))
