"""The same tensors in pyreft give the same outputs and gradients, and the same tokens are edited but for its rounding.

pyreft keeps R as an orthogonal parametrization of its own, so gradients are compared at what both train alike (W, b)
and at the input, through which R enters. Every token is edited: n first and n last ones of n.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab.core.positions import marks
from trimtab.core.spectrum import orthonormal

interventions = pytest.importorskip("pyreft.interventions")

WIDTH, RANK, TOKENS = 24, 3, 7
THEIRS = {
    "loreft": "LoreftIntervention",
    "direft": "NodireftIntervention",
    "noreft": "NoreftIntervention",
    "consreft": "ConsreftIntervention",
    "lobireft": "LobireftIntervention",
}


def agree(found: Tensor, wanted: Tensor, what: str) -> None:
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max(), what


@pytest.mark.parametrize("name", THEIRS)
def test_outputs_and_gradients(name: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(10, WIDTH)
    model = nn.Sequential(layer)
    settings: Any = {"rank": RANK, "first": TOKENS, "last": TOKENS}
    tt.attach(model, tt.methods()[name](**settings), "0")
    ours = layer.delta["default"]  # type: ignore[index]
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    kwargs = {"embed_dim": WIDTH, "low_rank_dimension": RANK, "dtype": torch.float32, "add_bias": False}
    theirs = getattr(interventions, THEIRS[name])(**kwargs)
    pairs = {}
    with torch.no_grad():
        if hasattr(theirs, "rotate_layer"):
            theirs.rotate_layer.weight = orthonormal(ours.M).mT
        else:
            theirs.proj_layer.weight.copy_(ours.W2)
            pairs["W2"] = theirs.proj_layer.weight
        source = theirs.learned_source
        if isinstance(source, nn.Linear):
            source.weight.copy_(ours.W if name == "loreft" else ours.W1)
            source.bias.copy_(ours.b)
            pairs |= {"W" if name == "loreft" else "W1": source.weight, "b": source.bias}
        else:
            source.copy_(ours.b)
            pairs["b"] = source
    x = torch.randn(2, TOKENS, 10)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    frozen = nn.Linear(10, WIDTH)
    frozen.load_state_dict({key: layer._parameters[key].detach() for key in ("weight", "bias")})
    y, z = model(mine), theirs(frozen(other))
    agree(y, z, "outputs")
    y.square().mean().backward()
    z.square().mean().backward()
    agree(mine.grad, other.grad, "gradient of the input")
    for key, value in pairs.items():
        agree(getattr(ours, key).grad, value.grad, f"gradient of {key}")


def test_positions_are_theirs_where_a_prompt_is_even_or_long() -> None:
    locations = pytest.importorskip("pyreft.dataset").get_intervention_locations
    for n in range(2, 30):
        places = locations(share_weights=True, last_position=n, first_n=7, last_n=6, num_interventions=1)[0]
        theirs = {at for at in places if at >= 0}
        ours = {at for at, (edited,) in enumerate(marks(n, n, [(7, 6)])) if edited}
        assert ours - theirs == ({n - 1 - n // 2} if n % 2 and n // 2 < 6 else set()), "it rounds both halves down"
        assert theirs <= ours
