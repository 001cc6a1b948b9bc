"""Checkpoints beside the training: a copy is taken at once, errors are told, nothing is left half written."""

from __future__ import annotations

import errno
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trimtab as tt
from trimtab.core.errors import UserError
from trimtab.train import checkpoint, writer
from trimtab.train.writer import Writer


@pytest.fixture
def training() -> tuple[Any, Any]:
    model = tt.attach(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), tt.LoRA(rank=2), "0, 1")
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.1)
    step(model, optimizer)
    return model, optimizer


def step(model: Any, optimizer: Any) -> None:
    model(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in checkpoint.taken(model).items()}


def test_a_step_does_not_wait_for_the_disk_and_changes_nothing_of_what_is_written(
    training: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = training
    store = checkpoint.store
    monkeypatch.setattr(checkpoint, "store", lambda *given: time.sleep(0.5) or store(*given))
    with Writer(tmp_path, 2) as one:
        expected, started = trained(model), time.perf_counter()
        one.write(model, optimizer, 1, {}, {})
        assert time.perf_counter() - started < 0.4
        step(model, optimizer)
        assert checkpoint.found(tmp_path) == []
        one.wait()
        assert [path.name for path in checkpoint.found(tmp_path)] == ["step-00000001"]
    saved, problems = checkpoint.newest(tmp_path)
    assert saved is not None
    assert not problems
    for key, value in expected.items():
        assert torch.equal(saved.tensors[f"adapter.{key}"], value)
        assert not torch.equal(trained(model)[key], value) or not value.any()


def test_a_large_state_is_written_while_the_step_waits(
    training: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "LARGE", 1)
    with Writer(tmp_path, 2) as one:
        one.write(*training, 1, {}, {})
        assert one.pool is None
        assert len(checkpoint.found(tmp_path)) == 1


def test_a_full_disk_is_told_at_the_next_call_and_leaves_the_last_checkpoint(
    training: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Writer(tmp_path, 2) as one:
        one.write(*training, 1, {}, {})
        one.wait()
        monkeypatch.setattr(checkpoint, "write_tensors", failing)
        one.write(*training, 2, {}, {})
        with pytest.raises(UserError, match="No space left on device"):
            one.write(*training, 3, {}, {})
        one.wait()
    folder = tmp_path / checkpoint.FOLDER
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    assert checkpoint.newest(tmp_path)[0] is not None


def failing(*given: Any, **more: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_way_out_ends_the_thread_and_hides_no_error(
    training: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "write_tensors", failing)
    one = Writer(tmp_path, 2)

    def loop() -> None:
        with one:
            one.write(*training, 1, {}, {})
            raise RuntimeError("of the loop")

    with pytest.raises(RuntimeError, match="of the loop"):
        loop()
    assert one.pool is not None
    assert one.pool._shutdown
