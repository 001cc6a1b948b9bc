"""Weights of a mapped file: given back where that loses nothing, and moved to where a cache line begins."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import trimtab as tt
from trimtab.core.mapped import SMALL, align, let_go

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the system decides by itself")
SIDE = 512
BYTES = 4 * SIDE * SIDE


def mapped(file: Path, count: int = 1) -> list[Tensor]:
    """Tensors of a file that is mapped, 8 bytes into a page and read once."""
    size = BYTES * count + 8
    file.write_bytes(torch.randn(size // 4).numpy().tobytes())
    storage = torch.UntypedStorage.from_file(str(file), False, size)
    found = []
    for at in range(count):
        view = torch.empty(0, dtype=torch.float32).set_(storage, 2 + at * SIDE * SIDE, (SIDE, SIDE))  # type: ignore[call-overload]
        assert view.sum().isfinite()
        found.append(view)
    return found


def resident(file: Path) -> int:
    """Bytes of a mapped file that count as this process's memory."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.endswith(str(file)):
            return 1024 * next(int(one.split()[1]) for one in lines if one.startswith("Rss:"))
    return 0


class Model(nn.Module):
    """Linears and a lookup table whose weights are those of a file."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(SIDE, SIDE, bias=False) for _ in weights[1:])
        self.table = nn.Embedding(SIDE, SIDE)
        for module, weight in zip((self.table, *self.linears), weights, strict=True):
            module.weight = nn.Parameter(weight, requires_grad=False)  # type: ignore[assignment]

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.table(ids)
        for layer in self.linears:
            x = layer(x).tanh()
        return x


def test_pages_of_a_file_go_and_come_again(tmp_path: Path) -> None:
    (W,) = mapped(tmp_path / "weights")
    before, held = W.clone(), resident(tmp_path / "weights")
    given = let_go(W)
    assert given >= BYTES - 2 * 4096
    assert resident(tmp_path / "weights") <= held - given
    assert torch.equal(W, before)


def test_a_weight_that_was_changed_stays(tmp_path: Path) -> None:
    (W,) = mapped(tmp_path / "weights")
    W[SIDE // 2, 3] = 17.0
    before = W.clone()
    assert let_go(W) == 0
    assert torch.equal(W, before)


@pytest.mark.parametrize("value", [torch.randn(SIDE, SIDE), torch.zeros(SIDE, SIDE), torch.randn(SIDE, SIDE).mT])
def test_memory_that_is_no_file_is_left_alone(value: Tensor) -> None:
    before = value.clone()
    assert let_go(value) == 0
    assert torch.equal(value, before)


def test_aligned_weights_are_the_same_and_the_file_is_let_go(tmp_path: Path) -> None:
    model = Model(mapped(tmp_path / "weights", 4))
    before = {name: p.clone() for name, p in model.named_parameters()}
    held, parameters = resident(tmp_path / "weights"), dict(model.named_parameters())
    assert align(model) == ["linears.0", "linears.1", "linears.2"]
    assert all(layer.weight.data_ptr() % 64 == 0 for layer in model.linears)
    assert model.table.weight.data_ptr() % 64 == 8, "a table is not multiplied with"
    assert resident(tmp_path / "weights") <= held - 3 * BYTES + 4 * 4096
    for name, p in model.named_parameters():
        assert p is parameters[name]
        assert torch.equal(p, before[name])
    assert align(model) == []


def test_what_is_small_or_trains_or_is_not_read_stays(tmp_path: Path) -> None:
    model = Model(mapped(tmp_path / "weights", 4))
    model.linears[0].weight.requires_grad_(True)
    tt.attach(model.linears[1], tt.Full(), where="")
    small = nn.Linear(SMALL // SIDE - 1, SIDE, bias=False)
    model.linears.append(small)
    small.weight = nn.Parameter(mapped(tmp_path / "more")[0].view(-1)[: small.weight.numel()].view_as(small.weight))
    small.weight.requires_grad_(False)
    assert align(model) == ["linears.2"]


@pytest.mark.parametrize("how", ["codes", "copy"])
def test_a_file_is_let_go_when_its_weights_are_encoded_or_replaced(how: str, tmp_path: Path) -> None:
    model = Model(mapped(tmp_path / "weights", 4))
    ids = torch.arange(8)
    held, before = resident(tmp_path / "weights"), model(ids)
    if how == "codes":
        tt.quantize(model, tt.NF4())
    else:
        tt.attach(model, tt.Full(), "linears.*")
    assert resident(tmp_path / "weights") <= held - 3 * BYTES + 6 * 4096
    if how == "copy":
        assert torch.equal(model(ids), before)
        tt.detach(model)
        assert torch.equal(model(ids), before)


def test_files_of_weights_begin_inside_a_line(tmp_path: Path) -> None:
    """Why all this: the header of a safetensors file has any length."""
    save_file({"a": torch.randn(SIDE, SIDE)}, tmp_path / "a.safetensors")
    length = int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little")
    assert (8 + length) % 64


def test_a_model_of_more_than_half_the_memory_stays_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(mapped(tmp_path / "weights", 3))
    monkeypatch.setattr("trimtab.core.mapped.host_memory", lambda: 4 * BYTES - 1)
    assert align(model) == []
    monkeypatch.setattr("trimtab.core.mapped.host_memory", lambda: 4 * BYTES)
    assert align(model) == ["linears.0", "linears.1"]
