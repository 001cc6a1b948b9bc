"""Files of kohya's scripts and of LyCORIS: the weights they mean, written out in NumPy, are the weights here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.interop.conftest import make

import trimtab as tt
from trimtab.core.errors import UserError

SITES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
Tensors = dict[str, torch.Tensor]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def lora(out: int, into: int) -> tuple[Tensors, np.ndarray]:
    up, down = drawn(out, 3), drawn(3, into)
    tensors = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(2.0)}
    return tensors, 2.0 / 3 * up.double().numpy() @ down.double().numpy()


def loha(out: int, into: int) -> tuple[Tensors, np.ndarray]:
    t = {f"hada_w{n}_{side}": drawn(*((out, 2) if side == "a" else (2, into)), seed=n) for n in (1, 2) for side in "ab"}
    w = {key: value.double().numpy() for key, value in t.items()}
    change = 5.0 / 2 * (w["hada_w1_a"] @ w["hada_w1_b"]) * (w["hada_w2_a"] @ w["hada_w2_b"])
    return t | {"alpha": torch.tensor(5.0)}, change


def lokr(out: int, into: int) -> tuple[Tensors, np.ndarray]:
    w1, a, b = drawn(4, 4), drawn(out // 4, 1), drawn(1, into // 4)
    tensors = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(3.0)}
    return tensors, 3.0 * np.kron(w1.double().numpy(), (a @ b).double().numpy())


def lokr_full(out: int, into: int) -> tuple[Tensors, np.ndarray]:
    """With two full factors alpha does not scale."""
    w1, w2 = drawn(4, 4), drawn(out // 4, into // 4)
    tensors = {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(7.0)}
    return tensors, np.kron(w1.double().numpy(), w2.double().numpy())


def lokr_both(out: int, into: int) -> tuple[Tensors, np.ndarray]:
    a1, b1, a2, b2 = drawn(4, 1), drawn(1, 4, seed=1), drawn(out // 4, 1), drawn(1, into // 4)
    tensors = {"lokr_w1_a": a1, "lokr_w1_b": b1, "lokr_w2_a": a2, "lokr_w2_b": b2, "alpha": torch.tensor(2.0)}
    return tensors, 2.0 * np.kron((a1 @ b1).double().numpy(), (a2 @ b2).double().numpy())


def written(path: Path, kind: Any, prefix: str) -> dict[str, np.ndarray]:
    """A file of one kind at two modules; the change of each."""
    model, tensors, changes = make("llama"), {}, {}
    for site in SITES:
        held, changes[site] = kind(*model.get_submodule(site).weight.shape)
        tensors |= {f"{prefix}{site.replace('.', '_')}.{key}": value for key, value in held.items()}
    save_file(tensors, path)
    return changes


@pytest.mark.parametrize("prefix", ["lora_te_", "lycoris_"])
@pytest.mark.parametrize("kind", [lora, loha, lokr, lokr_full, lokr_both], ids=lambda kind: kind.__name__)
def test_the_weights_are_those_of_the_definition(kind: Any, prefix: str, tmp_path: Path) -> None:
    changes = written(tmp_path / "file.safetensors", kind, prefix)
    model = make("llama")
    before = {site: model.get_submodule(site).weight.detach().double().numpy().copy() for site in SITES}
    tt.load(model, tmp_path / "file.safetensors")
    tt.merge(model)
    for site in SITES:
        found = model.get_submodule(site).weight.detach().double().numpy() - before[site]
        assert np.abs(found - changes[site]).max() < 1e-6
        assert np.abs(changes[site]).max() > 1e-2


def test_magnitudes_are_the_lengths_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    model = make("llama")
    site = SITES[0]
    W = model.get_submodule(site).weight.detach().double().numpy()
    held, change = lora(*W.shape)
    m = drawn(W.shape[0], 1).abs() + 0.5
    flat = f"lycoris_{site.replace('.', '_')}"
    save_file({f"{flat}.{key}": value for key, value in (held | {"dora_scale": m}).items()}, path)
    tt.load(model, path)
    tt.merge(model)
    V = W + change
    wanted = m.double().numpy() * V / np.linalg.norm(V, axis=1, keepdims=True)
    assert np.abs(model.get_submodule(site).weight.detach().double().numpy() - wanted).max() < 1e-6


def test_what_has_no_place_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    strange: Tensors = {}
    for stem in ("nowhere", "model_norm_x"):
        strange |= {f"lora_te_{stem}.{key}": value.clone() for key, value in lora(4, 4)[0].items()}
    save_file(strange, path)
    with pytest.raises(UserError, match="2 problems"):
        tt.load(make("llama"), path)
    flat = "lora_te_model_layers_0_self_attn_q_proj"
    tucker = {f"{flat}.{key}": value for key, value in lora(32, 32)[0].items()}
    save_file(tucker | {f"{flat}.lora_mid.weight": drawn(3, 3)}, path)
    with pytest.raises(UserError, match="lora_mid"):
        tt.load(make("llama"), path)
