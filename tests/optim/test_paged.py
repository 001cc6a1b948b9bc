"""Where a paged state is, and that it makes no difference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import trimtab as tt
from trimtab.core.errors import UserError


def trained(rule: tt.Transform, steps: int = 4) -> tuple[tt.Optimizer, torch.Tensor]:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(40, 120))
    driver = tt.Optimizer([p], rule, lr=0.01, weight_decay=0.1)
    for step in range(steps):
        p.grad = torch.sin(p.detach() * (step + 1))
        driver.step()
    return driver, p.detach()


def mapped_files() -> list[str]:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc to look at")
    return [line for line in maps.read_text().splitlines() if "trimtab-" in line]


@pytest.mark.parametrize("inner", ["adamw", "adam8"])
def test_a_state_in_files_makes_no_difference_and_leaves_no_file(inner: str, tmp_path: Path) -> None:
    rule = tt.Paged(inner=inner, folder=str(tmp_path), smallest=1000)
    driver, p = trained(rule)
    _, plain = trained(rule.inners[0])
    assert torch.equal(p, plain)
    assert len(mapped_files()) == 2
    assert all("(deleted)" in line for line in mapped_files())
    assert not list(tmp_path.iterdir())
    second, _ = trained(rule, 0)
    second.load_state_dict(driver.state_dict())
    assert len(mapped_files()) == 4, "a loaded state is in files too"
    for one in (driver, second):
        one.state.clear()
    assert not mapped_files(), "a state that is freed gives its pages back"


def test_small_tensors_stay() -> None:
    trained(tt.Paged(smallest=100_000))
    assert not mapped_files()


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file for"):
        trained(tt.Paged(folder=str(tmp_path / "none"), smallest=1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_the_state_is_pinned_and_makes_no_difference() -> None:
    found = []
    for rule in (tt.AdamW(), tt.Paged(smallest=1)):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(40, 120, device="cuda"))
        driver = tt.Optimizer([p], rule, lr=0.01)
        for _ in range(4):
            p.grad = torch.sin(p.detach())
            driver.step()
        found.append(p.detach())
    assert torch.equal(*found)
    assert driver.state[p]["m"].is_pinned()
