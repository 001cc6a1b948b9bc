"""Tensors written one after the other: what the reference library reads, its checksum, and no copy of it all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from trimtab.core.errors import UserError
from trimtab.core.files import sha256_of, write_together
from trimtab.core.tensor_file import DTYPES, write_tensors


def test_the_reference_library_reads_every_type_and_shape(tmp_path: Path) -> None:
    base = torch.arange(-6, 6).reshape(3, 4)
    tensors = {str(dtype): base.clamp(min=0).to(torch.float32).to(dtype) for dtype in DTYPES}
    tensors |= {"none": torch.zeros(0, 3), "one": torch.tensor(2.5), "turned": torch.randn(3, 5).mT}
    tensors |= {
        "again": tensors["turned"],
        "odd": torch.ones(7, dtype=torch.uint8),
        "trained": torch.ones(2).requires_grad_(),
    }
    told = write_tensors(tmp_path / "all", tensors, {"format": "pt"})
    assert told == sha256_of(tmp_path / "all")
    found = load_file(tmp_path / "all")
    assert set(found) == set(tensors)
    for name, value in tensors.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert torch.equal(
            found[name].reshape(-1).view(torch.uint8), value.detach().contiguous().reshape(-1).view(torch.uint8)
        )
    with safe_open(tmp_path / "all", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    write_together(tmp_path, {"a": b"old", "b": b"old"})

    def full(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"could not write a, b to .*: No space left on device"):
        write_together(tmp_path, {"a": b"new", "b": full})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old", "b": b"old"}


def test_what_has_no_name_in_the_format_leaves_nothing_behind(tmp_path: Path) -> None:
    def strange(path: Path) -> None:
        path.write_bytes(b"begun")
        write_tensors(path, {"x": torch.zeros(2, dtype=torch.complex128)})

    with pytest.raises(UserError, match=r"cannot hold torch\.complex128"):
        write_together(tmp_path / "new", {"a": strange})
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_writing_holds_nothing_twice(tmp_path: Path) -> None:
    program = (
        "import resource, sys, torch\nfrom pathlib import Path\nfrom trimtab.core.tensor_file import write_tensors\n"
        "held = {str(at): torch.ones(4, 1 << 20) for at in range(8)}\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10\n"
        "before = peak()\nwrite_tensors(Path(sys.argv[1]), held)\nprint(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "all")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 16 << 20
